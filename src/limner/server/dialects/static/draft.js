// What was being asked for, over a reload of the page. It is forgotten with the tab.

import { announce, dataURL, fileOf } from "./dom.js";
import { Mask } from "./mask.js";

const DRAFT = "limner.draft";
const MOST = 1e6; // characters of a mask; browsers give a page 5 MB

let saves = 0;

/** Saves what is being asked for, unless it is saved again before this has come to its end. */
export async function saveDraft({ form, references, change, loras }) {
  const mine = ++saves;
  const { values } = form, names = references.items.map((item) => item.name), weights = references.items.map((item) => item.weight);
  const handle = await references.handle().catch(() => null);
  if (mine !== saves) return;
  const of = references.items[0]?.change, { strength, preserves } = change, { values: own } = loras;
  const mask = of?.mask ? await dataURL(await of.mask.file()) : null;
  if (mine !== saves) return;
  const part = of ? { part: of.part, margins: of.margins, blur: of.blur, mask: mask?.length < MOST ? mask : null } : null;
  try {
    sessionStorage.setItem(DRAFT, JSON.stringify({ values, names, weights, handle, strength, preserves, part, loras: own }));
  } catch {
    sessionStorage.removeItem(DRAFT); // no room
  }
}

/** `take(handle, names, weights)` gets the references back. */
export async function restoreDraft({ form, references, change, loras, take }) {
  const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
  if (!draft) return;
  form.values = draft.values;
  loras.values = draft.loras ?? null;
  if (draft.handle) {
    await take(draft.handle, draft.names, draft.weights).catch(() => announce("The references of before are no longer kept"));
  }
  change.strength = draft.strength ?? 1;
  change.preserves = draft.preserves ?? false;
  const first = references.items[0];
  if (draft.part && first) {
    const { mask, ...part } = draft.part;
    const painted = mask ? await Mask.from(fileOf(mask)) : null;
    const [width, height] = first.report?.processed_size ?? [];
    // the picture is now the server's; a mask of another size is of the file, which is gone
    if (part.part !== "mask") first.change = { ...part, mask: null };
    else if (painted?.width === width && painted?.height === height) first.change = { ...part, mask: painted };
    else announce("The mask of before is gone with its file");
    change.refresh();
  }
  form.refresh(draft.values.size);
}
