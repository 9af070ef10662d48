"""One call of a model: encode, prefill, denoise, decode."""

from limner.grid import check_size
from limner.pipeline.drop_in import Flux2KleinKVPipeline, Flux2KleinPipeline
from limner.pipeline.drop_in_inpaint import Flux2KleinInpaintPipeline
from limner.pipeline.load import check_device
from limner.pipeline.output import PipelineOutput
from limner.pipeline.pipeline import Pipeline, StepCallback
from limner.pipeline.prefill import Picture
from limner.pipeline.progress import Progress, Timings
from limner.pipeline.prompts import PromptReport
from limner.requests import check_prompt

__all__ = [
    "Flux2KleinInpaintPipeline",
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "Picture",
    "Pipeline",
    "PipelineOutput",
    "Progress",
    "PromptReport",
    "StepCallback",
    "Timings",
    "check_device",
    "check_prompt",
    "check_size",
]
