import unicodedata

import pytest

from dit4sr_pl.common.names import check_name, check_names


@pytest.mark.parametrize(
    "name", ["a", "a/b.png", "..a", "a..", "x y/é, 'z'\n.png", "a" * 251 + ".png", "a/" * 999 + "b"]
)
def test_names_below_a_folder_stay_as_they_are(name):
    assert check_name(name, "table") == name


@pytest.mark.parametrize("name", ["", None, 3, "/a", "../a", "a/../b", "a/..", ".", "./a", "a//b", "a/", "a\0b"])
def test_names_that_are_none_or_leave_their_folder_are_refused(name):
    with pytest.raises(ValueError, match="table: .*(is not the name of a file|does not stay within its folder)"):
        check_name(name, "table")


def test_names_that_cannot_be_written_everywhere_are_refused():
    with pytest.raises(ValueError, match="table: .*not UTF-8"):
        check_name("ab\udcff.png", "table")
    with pytest.raises(ValueError, match="longer than 255 bytes"):
        check_name("é" * 128, "table")


@pytest.mark.parametrize("one, other", [("a", "a"), ("Photo", "photo"), ("straße", "STRASSE"), ("é", "e\u0301")])
def test_two_names_that_one_file_system_takes_for_one_are_refused(one, other):
    with pytest.raises(ValueError, match="are one name; rename"):
        check_names([one, "between", other], "table")


def test_different_names_are_allowed():
    names = ["e", "é", "a/b", "ab", unicodedata.normalize("NFD", "ü")]
    assert check_names(names, "table") == names
