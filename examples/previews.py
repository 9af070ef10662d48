"""Look while it draws, and stop when it is good enough."""

from typing import Any

import limner


def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
    """Called after every step, with small pictures (B, 3, height/8, width/8) in [0, 1]."""
    print(f"step {step + 1}: a preview of {tuple(tensors['preview'].shape)}")
    if step == 2:
        pipe._interrupt = True  # leaves out the remaining steps of this call


pipe = limner.Pipeline.from_pretrained()
out = pipe(
    "a big rocket in the night sky",
    callback_on_step_end=look,
    callback_on_step_end_tensor_inputs=["latents", "preview"],
)
out.images[0].save("rocket.png")
