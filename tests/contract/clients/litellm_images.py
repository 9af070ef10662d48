"""LiteLLM against the service at argv[1] with the picture of argv[2]; runs in a Python of its own. Prints JSON."""

import json
import sys

import litellm

url, first = sys.argv[1:3]
common = {"api_base": f"{url}/v1", "api_key": "none"}
found = {}
answer = litellm.image_generation(model="openai/gpt-image-1", prompt="a red ball", size="64x80", **common)
found["generate"] = [one.b64_json for one in answer.data]
answer = litellm.image_generation(model="openai/flux-2-klein-9b", prompt="a red ball", size="64x64", n=2, **common)
found["own name"] = [one.b64_json for one in answer.data]
with open(first, "rb") as file:
    answer = litellm.image_edit(model="openai/gpt-image-1", prompt="make it blue", image=[file], **common)
found["edit"] = [one.b64_json for one in answer.data]
print(json.dumps(found))
