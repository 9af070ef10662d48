"""Edit with two references. First: limner samples"""

import limner

pipe = limner.Pipeline.from_pretrained()  # the bundled model; or "klein-9b-kv", a folder, a hub id
out = pipe("use the background of image 2", image=["samples/cat.png", "samples/beach.png"])
out.images[0].save("edit.png")
print(out)
