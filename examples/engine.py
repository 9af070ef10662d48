"""Many requests at once: those that share references run as one batch."""

import limner
from limner.engine import future_of
from limner.images import prepare_references

pipe = limner.Pipeline.from_pretrained()
engine = limner.Engine(pipe)
cast = prepare_references(["samples/beach.png", "samples/cat.png"], policy=pipe.reference_policy)
jobs = [
    future_of(
        engine, limner.EditRequest(prompt=f"put the cat from image 2 into image 1 {place}", seeds=(1,), references=cast)
    )
    for place in ("on the left", "on the right", "in the top right corner")
]
for number, job in enumerate(jobs):
    job.result().images[0].save(f"job-{number}.png")
print(engine.stats().prefills, "prefill for", len(jobs), "requests")
engine.close()
