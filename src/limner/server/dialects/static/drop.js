// Pictures that are dropped or pasted anywhere on the page. What comes from another site is an address, not a file.

import { fileOf } from "./dom.js";
import * as api from "./api.js";

const OWN = "application/x-limner-reference"; // a reference that is moved

/**
 * `add(files)` takes pictures, `complain(error)` shows why there are none. `fetches()`: whether the server fetches addresses.
 */
export function takeDrops({ add, complain, fetches }) {
  for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => {
    if (!carriesPictures(event.dataTransfer)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    const { dataTransfer: data } = event;
    if (!carriesPictures(data) || !(data.files.length || pictureAddress(data))) return; // text goes where it is dropped
    event.preventDefault();
    take(data);
  });
  document.addEventListener("paste", (event) => {
    const { clipboardData: data } = event;
    if (!data.files.length && (event.target.matches?.("input, textarea") || !pictureAddress(data))) return; // words go where the cursor is
    event.preventDefault();
    take(data);
  });

  async function take(data) {
    complain(null);
    if (data.files.length) {
      add(data.files);
      return;
    }
    const address = pictureAddress(data);
    try {
      add([await fetched(address)]);
    } catch (error) {
      complain(error);
    }
  }

  async function fetched(address) {
    const name = address.startsWith("data:") ? "picture" : decodeURIComponent(address.split(/[?#]/)[0].split("/").pop()).slice(0, 80) || "picture";
    if (address.startsWith("data:")) {
      const file = fileOf(address);
      return new File([file], name, { type: file.type });
    }
    if (address.startsWith(`${location.origin}/`)) {
      const file = await api.blob(address);
      return new File([file], name, { type: file.type });
    }
    if (!fetches()) {
      throw new api.Refused(422, `The browser gives only the address of a picture of another site (${address.slice(0, 80)}). Save the picture, `
        + "and choose or drop the file. Or start the server with --fetch-urls, and it fetches such pictures itself.", "");
    }
    const { id } = await api.post("/v1/references", { images: [address], prefill: false });
    const file = await api.blob(`/v1/references/${id}/1.png`);
    return new File([file], name, { type: file.type });
  }
}

function carriesPictures({ types }) {
  return !types.includes(OWN) && (types.includes("Files") || types.includes("text/uri-list") || types.includes("text/html"));
}

/** The address of the picture in a drop or a paste, "" if there is none. */
function pictureAddress(data) {
  const html = data.getData("text/html");
  const image = html ? new DOMParser().parseFromString(html, "text/html").querySelector("img[src]") : null;
  const found = image?.getAttribute("src") || data.getData("text/uri-list").split("\n").find((line) => line && !line.startsWith("#")) || "";
  return /^(https?:|data:image\/)/.test(found.trim()) ? found.trim() : "";
}
