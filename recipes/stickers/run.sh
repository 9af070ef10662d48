#!/usr/bin/env bash
# Makes the bundled model from nothing: font, autoencoder, data, transformer, export, evaluation. Seeded and resumable:
# run it again after a stop and it goes on. One part alone: run.sh font | vae | data | train | export | eval.
set -euo pipefail
cd "$(dirname "$0")"
build=build
python=${PYTHON:-../../.venv/bin/python}
mkdir -p "$build"
resume() { [ -f "$1/checkpoint.pt" ] && echo --resume || true; }

font() {
    [ -f "$build/NotoColorEmoji.ttf" ] && return
    # Debian's package, unpacked here without installing it (Noto Emoji, SIL Open Font License 1.1)
    (cd "$build" && apt-get download fonts-noto-color-emoji && dpkg -x fonts-noto-color-emoji_*.deb font)
    cp "$build/font/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf" "$build/"
}
vae() { [ -d "$build/vae/vae" ] || "$python" train_autoencoder.py --out "$build/vae" $(resume "$build/vae"); }
data() { [ -f "$build/data/data.pt" ] || "$python" prepare.py --out "$build/data" --vae "$build/vae/vae"; }
train() { "$python" train.py --out "$build/model" --data "$build/data/data.pt" $(resume "$build/model"); }
export_model() {
    "$python" export.py --run "$build/model" --vae "$build/vae/vae" --tokenizer "$build/data/tokenizer" \
        --out ../../src/limner/assets
}
evaluate() { "$python" evaluate.py --sheet "$build/sheet.png" --save-cases ../../tests/quality/cases; }

case "${1:-all}" in
    font | vae | data | train) "$1" ;;
    export) export_model ;;
    eval) evaluate ;;
    all) font && vae && data && train && export_model && evaluate ;;
    *) echo "run.sh: $1 is not one of font, vae, data, train, export, eval" >&2 && exit 2 ;;
esac
