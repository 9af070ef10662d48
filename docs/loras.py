"""Writes the section on LoRAs of docs/compatibility.md from the tables of the code; a test tells when it is out of date.

.venv/bin/python docs/loras.py
"""

from __future__ import annotations

from pathlib import Path

from limner.weights.lora.dialects import DIALECTS, Dialect
from limner.weights.lora.kinds import KINDS, REFUSED

FILE = Path(__file__).with_name("compatibility.md")
START, END = "<!-- from docs/loras.py; do not edit -->\n", "<!-- end of docs/loras.py -->\n"
TITLE = "# Compatibility\n\n"
EXAMPLES = {"diffusers": "transformer_blocks.0.attn.to_q", "original": "double_blocks.0.img_attn.qkv"}
TEXT = """\
## LoRA dialects

`limner inspect FILE` names the dialect and the kind of a file. A name is a prefix and the name that a matrix has in one of
two layouts. Every dialect may hold every kind of update.

| name of a matrix | layout | written by |
|---|---|---|
{dialects}

In names of diffusers, q, k and v may also be one matrix (`attn.to_qkv`, `attn.to_added_qkv`). A pair of matrices is
`lora_A.weight` and `lora_B.weight`, `lora_down` and `lora_up`, or `lora.down` and `lora.up`. A PEFT adapter's name may
follow (`lora_A.default.weight`).

| kind | what it adds | tensors | tested by |
|---|---|---|---|
{kinds}

- The scale is alpha / rank, from `.alpha` in the file, else from the configuration (`lora_adapter_metadata` in the
  header, `adapter_config.json` beside the file), with `use_rslora` alpha / sqrt(rank). The rank is that of the tensors.
  Patterns are looked up under the names of the file, then under those of diffusers. A file and a configuration that
  disagree are refused.
- The alpha of a LoKr of two whole factors has no meaning and is not read: ai-toolkit writes 9999999999 there, which is
  infinite in float16.
- An OFT needs the weights, so it is refused for int8 and for `parallel="tensor"`. LoKr is refused for `parallel="tensor"`.

Refused by name, with the reason and the remedy in the message (for most: merge it into its model with its trainer, and
give the merged model or the difference of weights):

| kind | tensors | reason |
|---|---|---|
{refused}
| PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA | `init_lora_weights` in the configuration | trained on weights that the start was \
taken out of; PEFT writes them as plain LoRAs (`path_initial_model_for_weight_conversion`) |
| other adapters of PEFT | `peft_type`, `use_qalora` and the like in the configuration | more than a product of their \
tensors |
| changes of norms, LoRAs of text encoders | | no matrices of the transformer; `strict=False` leaves them out |
"""
TESTS = {
    "LoRA": "lycoris-lora, PEFT, diffusers' pipeline",
    "LoKr": "lycoris-lora, PEFT, diffusers' pipeline",
    "LoHa": "lycoris-lora, PEFT",
    "difference": "lycoris-lora",
    "OFT": "lycoris-lora",
}


def section() -> str:
    """Return what the section has to say."""
    return TEXT.format(
        dialects="\n".join(map(_dialect, DIALECTS)),
        kinds="\n".join(
            f"| {kind} | {formula} | {_code(parts)} | {TESTS[kind]} |" for kind, (formula, *parts) in KINDS.items()
        ),
        refused="\n".join(
            f"| {kind} | {_code(parts)} | {reason.partition('; ')[0]} |" for kind, (parts, reason) in REFUSED.items()
        ),
    )


def _dialect(dialect: Dialect) -> str:
    name = EXAMPLES[dialect.layout]
    name = dialect.prefix + (name.replace(".", "_") if dialect.flat else name)
    return f"| `{name}` | {dialect.layout} | {dialect.writers} |"


def _code(names: tuple[str, ...] | list[str]) -> str:
    written = {"down": "lora_A.weight", "up": "lora_B.weight"}
    return ", ".join(f"`{written.get(name, name)}`" for name in names)


def document(text: str) -> str:
    """Return a document with its section renewed, or with it at its end."""
    before, found, rest = text.partition(START)
    after = rest.partition(END)[2] if found else ""
    return f"{before}{START}\n{section()}\n{END}{after}"


if __name__ == "__main__":
    FILE.write_text(document(FILE.read_text() if FILE.exists() else TITLE))
