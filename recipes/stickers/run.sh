#!/usr/bin/env bash
# Makes the bundled model from nothing: font, autoencoder, data, transformer, export, evaluation. Seeded and resumable:
# run it again after a stop and it goes on. One part alone: run.sh font | vae | refine | data | train | export | eval | plots.
# Where things go and how long they run: BUILD, ASSETS, VAE_ARGS, REFINE_ARGS, DATA_ARGS, TRAIN_ARGS, EXPORT_ARGS, EVAL_ARGS.
set -euo pipefail
cd "$(dirname "$0")"
build=${BUILD:-build}
assets=${ASSETS:-../../src/limner/assets}
python=${PYTHON:-../../.venv/bin/python}
mkdir -p "$build"
resume() { [ -f "$1/checkpoint.pt" ] && echo --resume || true; }

font() {
    [ -f build/NotoColorEmoji.ttf ] && return
    # Debian's package, unpacked here without installing it (Noto Emoji, SIL Open Font License 1.1)
    mkdir -p build
    (cd build && apt-get download fonts-noto-color-emoji && dpkg -x fonts-noto-color-emoji_*.deb font)
    cp build/font/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf build/
}
vae() { [ -d "$build/vae/vae" ] || "$python" train_autoencoder.py --out "$build/vae" $(resume "$build/vae") ${VAE_ARGS:-}; }
refine() {
    [ -d "$build/refined/vae" ] ||
        "$python" refine_autoencoder.py --out "$build/refined" --vae "$build/vae/vae" $(resume "$build/refined") ${REFINE_ARGS:-}
}
data() { [ -f "$build/data/data.pt" ] || "$python" prepare.py --out "$build/data" --vae "$build/refined/vae" ${DATA_ARGS:-}; }
train() {
    # with a C++ compiler a step takes a fifth less; the data and the noise are the same
    default=$(command -v g++ > /dev/null && echo --compile || true)
    "$python" train.py --out "$build/model" --data "$build/data/data.pt" $(resume "$build/model") ${TRAIN_ARGS:-$default}
}
export_model() {
    "$python" export.py --run "$build/model" --vae "$build/refined/vae" --tokenizer "$build/data/tokenizer" \
        --data "$build/data/data.pt" --out "$assets" ${EXPORT_ARGS:-}
}
evaluate() {
    "$python" evaluate.py --model "$assets/stickers" ${EVAL_ARGS:---nearest-seed 0 --write "$assets/stickers/evaluation.json"}
    cp model-card.md "$assets/stickers/README.md"
}
plots() { "$python" plots.py --vae "$build/vae/log.jsonl" --model "$build/model/log.jsonl" --out curves; }

case "${1:-all}" in
    font | vae | refine | data | train | plots) "$1" ;;
    export) export_model ;;
    eval) evaluate ;;
    all) font && vae && refine && data && train && export_model && evaluate ;;
    *) echo "run.sh: $1 is not one of font, vae, refine, data, train, export, eval, plots" >&2 && exit 2 ;;
esac
