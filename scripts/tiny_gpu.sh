#!/bin/bash
# One stage of the small pair's training on a GPU machine without network, from the pack that tiny_pack.py made:
#
#   scripts/tiny_gpu.sh base MINUTES OUT          the base: two thirds of the time constant, one third decay
#   scripts/tiny_gpu.sh lr_stream MINUTES OUT     pairs, then the LR stream over that base
#   scripts/tiny_gpu.sh ablation STEPS SEED OUT   six networks side by side over that base, with one seed
#
# A stage needs two or three minutes more than it trains. It prints its table last and writes its state to OUT, in
# pieces of 15 MiB. On the same machine a stage continues what it finds in outputs/. On another machine, pieces in
# PACK/state are unpacked first: base.tar.* for all stages, constant.tar.* and lr_stream.tar.* to continue theirs.
set -eo pipefail
cd "$(dirname "$0")/.."
PACK=${PACK:-outputs/tiny/pack} PYTHON=${PYTHON:-python3} STAGE=$1 OUT=${!#}
NEW=outputs/tiny/base/tiny-sd3 TRAINED=outputs/tiny_dit4sr/full/seed0 PAIRS=outputs/tiny/pairs CROPS=outputs/demo/photos/crops
export PYTHONPATH=outputs/tiny/site:src PYTHONUNBUFFERED=1

join() { # NAME FILE: unpacks the pieces of a name, unless the file is there
    if [ ! -e "$2" ] && ls "$PACK/state/$1".tar.* >/dev/null 2>&1; then cat "$PACK/state/$1".tar.* | tar x; fi
}

pieces() { # NAME FILES...: writes files in pieces
    tar c "${@:2}" | split -b 15M -d - "$OUT/$1.tar."
}

minutes() { # SHARE MINUTES
    awk "BEGIN { print $1 * $2 }"
}

days() { # MINUTES: as days:hours:minutes:seconds
    awk "BEGIN { seconds = 60 * $1; printf \"00:00:%02d:%02d\", seconds / 60, seconds % 60 }"
}

make_pairs() {
    [ -e "$NEW/vae" ] || cp -rn src/dit4sr_pl/assets/tiny-sd3/. $NEW/
    $PYTHON scripts/tiny_pairs.py --photos "$PACK/photos/train" --pipeline $NEW --output $PAIRS | tail -1
}

mkdir -p "$OUT"
[ -d outputs/tiny/site ] || $PYTHON -m pip install -q --no-index --no-deps --target outputs/tiny/site "$PACK"/wheels/*
join base $NEW/transformer/config.json

case $STAGE in
base)
    join constant outputs/tiny/base/constant.pt
    options=(--photos "$PACK/photos" --pipeline src/dit4sr_pl/assets/tiny-sd3 --state outputs/tiny/base $OPTIONS)
    $PYTHON scripts/tiny_base.py "${options[@]}" --minutes "$(minutes 0.667 "$2")"
    $PYTHON scripts/tiny_base.py "${options[@]}" --minutes "$(minutes 0.333 "$2")" --phase decay
    pieces base $NEW/transformer
    pieces constant outputs/tiny/base/constant.pt
    ;;
lr_stream)
    join lr_stream $TRAINED/checkpoints
    make_pairs
    $PYTHON -m dit4sr_pl.train experiment=tiny_dit4sr trainer=gpu trainer.max_steps=1000000 \
        "trainer.max_time=$(days "$2")" model.backbone.name=$NEW "data.latents=[$PAIRS]" \
        data.batch_size=256 data.num_workers=8 callbacks.checkpoint.keep_last=1 $OPTIONS
    pieces lr_stream $TRAINED
    $PYTHON benchmarks/tiny.py --backbone $NEW --checkpoint $TRAINED/lr_stream.safetensors --crops 4
    ;;
ablation)
    make_pairs
    $PYTHON -c "from dit4sr_pl.data.demo_photos import write_crops; write_crops('$CROPS')"
    options=(experiment=ablation trainer=gpu trainer.precision=bf16-mixed "trainer.max_steps=$2" "seed=$3"
        model.backbone.name=$NEW "data.latents=[$PAIRS]" "data.validation_folders=[$CROPS]" data.batch_size=32
        data.num_workers=1 $OPTIONS)
    variants=full,no_lr_integration,no_lr_residual,no_lr_injection,linear_lr_injection
    OMP_NUM_THREADS=2 $PYTHON -m dit4sr_pl.train -m "${options[@]}" +ablation=$variants hydra.launcher.n_jobs=5 &
    OMP_NUM_THREADS=2 $PYTHON -m dit4sr_pl.train "${options[@]}" model=tiny_sd3_controlnet
    wait $!
    results=(ablation --exclude checkpoints --exclude '*.safetensors' outputs/ablation)
    pieces "${results[@]}" # also if the comparison fails
    $PYTHON -m dit4sr_pl.compare outputs/ablation output=outputs/ablation/compare strip.hr=$CROPS
    pieces "${results[@]}"
    ;;
*)
    echo "$STAGE: no such stage; give base, lr_stream or ablation" >&2
    exit 2
    ;;
esac
