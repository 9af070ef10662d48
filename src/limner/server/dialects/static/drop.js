// Pictures that are dropped or pasted anywhere on the page.

const carriesFiles = (event) => [...event.dataTransfer.types].includes("Files");

/** `add(files)` takes them. */
export function takeDrops({ add }) {
  for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!carriesFiles(event)) return;
    event.preventDefault();
    add(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return; // words go where the cursor is
    event.preventDefault();
    add(event.clipboardData.files);
  });
}
