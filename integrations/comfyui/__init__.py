"""Limner's nodes for ComfyUI: a model, references whose K/V stay between prompts, and drawing with them.

ComfyUI imports this folder from custom_nodes/. Nodes are plain Python over `limner`; what they need of ComfyUI is in
`host`.
"""

from .drawing import Edit, Generate
from .model import LoadLora, LoadModel
from .references import LoadReferences, MakeReferences, SaveReferences

NODE_CLASS_MAPPINGS = {
    "LimnerLoadModel": LoadModel,
    "LimnerLoadLora": LoadLora,
    "LimnerReferences": MakeReferences,
    "LimnerSaveReferences": SaveReferences,
    "LimnerLoadReferences": LoadReferences,
    "LimnerGenerate": Generate,
    "LimnerEdit": Edit,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LimnerLoadModel": "Load Limner Model",
    "LimnerLoadLora": "Load LoRA (Limner)",
    "LimnerReferences": "References (Limner)",
    "LimnerSaveReferences": "Save References (Limner)",
    "LimnerLoadReferences": "Load References (Limner)",
    "LimnerGenerate": "Generate (Limner)",
    "LimnerEdit": "Edit (Limner)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
