// Small helpers to build the page, and how numbers are written on it.

/** An element with properties, listeners (onclick: ...), attributes (anything with a dash, and role) and children. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function announce(text) {
  byId("announce").textContent = text;
}

export function seconds(value) {
  return `${value >= 10 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : value.toFixed(2)} s`;
}

export const size = ([width, height]) => `${width}x${height}`;

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** A share of something in percent; only nothing is 0 %. */
export function percent(share) {
  const value = share * 100;
  return `${value > 0 && value < 0.1 ? "under 0.1" : value.toFixed(value < 10 && value > 0 ? 1 : 0)} %`;
}

/** The picture in a file, upright. */
export async function pictureOf(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    throw new Error("The browser cannot read this picture; save it as PNG or JPEG.");
  }
}

/** A file as a data URL. */
export function dataURL(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** The file in a data URL. The page may not fetch one: its policy lets it ask the server alone. */
export function fileOf(url) {
  const [head, data] = url.split(/,(.*)/s), binary = head.endsWith(";base64") ? atob(data) : decodeURIComponent(data);
  return new Blob([Uint8Array.from(binary, (letter) => letter.charCodeAt(0))], { type: head.slice(5).split(";")[0] });
}

/** A button that does something while it is pressed, by pointer or by Space or Enter. */
export function whilePressed(button, pressed) {
  const set = (on) => {
    if ((button.getAttribute("aria-pressed") === "true") === on) return;
    button.setAttribute("aria-pressed", on);
    pressed(on);
  };
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    button.setPointerCapture(event.pointerId);
    set(true);
  });
  for (const kind of ["pointerup", "pointercancel", "blur"]) button.addEventListener(kind, () => set(false));
  button.addEventListener("contextmenu", (event) => event.preventDefault()); // a long press of a finger
  button.addEventListener("keydown", (event) => {
    if (event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    set(true);
  });
  button.addEventListener("keyup", () => set(false));
}
