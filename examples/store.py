"""Keep references on disk: found again by what is in the pictures, in any later process."""

import limner

store = limner.ReferenceStore(disk_path="kept", disk_bytes=2 << 30)
pipe = limner.Pipeline.from_pretrained(store=store)
first = pipe("remove the sticker", image="samples/duck.png")
again = pipe("make the sticker big", image="samples/duck.png")
store.flush()
print(first.reference_cache, "then", again.reference_cache, "saved", f"{again.seconds_saved:.3f} s")
