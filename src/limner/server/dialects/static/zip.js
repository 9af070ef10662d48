// A ZIP file of files as they are, without compression: pictures are compressed already.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let bit = 0; bit < 8; bit += 1) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/** The date and time of MS-DOS, as ZIP has them. */
function stamp(date) {
  return [
    (date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1),
    ((date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate(),
  ];
}

/** Numbers one after another, each as [value, bytes]. */
function record(...fields) {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [, bytes]) => sum + bytes, 0)));
  let at = 0;
  for (const [value, bytes] of fields) {
    if (bytes === 2) view.setUint16(at, value, true); else view.setUint32(at, value, true);
    at += bytes;
  }
  return view.buffer;
}

export class Zip {
  #parts = [];
  #directory = [];
  #length = 0;
  #names = new Set();

  /** Adds a file (Blob); a name that is there already gets a number. */
  async add(name, file, date) {
    const [, stem, ending] = /^(.*?)(\.[^.]*)?$/.exec(name);
    for (let n = 2; this.#names.has(name); n += 1) name = `${stem}-${n}${ending ?? ""}`;
    this.#names.add(name);
    const encoded = new TextEncoder().encode(name), crc = crc32(new Uint8Array(await file.arrayBuffer()));
    const [time, day] = stamp(date), { size } = file;
    // versions needed, names in UTF-8, stored; then time, day, crc, sizes, length of the name, no extra field
    const shared = [[20, 2], [0x800, 2], [0, 2], [time, 2], [day, 2], [crc, 4], [size, 4], [size, 4], [encoded.length, 2], [0, 2]];
    this.#directory.push(record([0x02014b50, 4], [20, 2], ...shared, [0, 2], [0, 2], [0, 2], [0, 4], [this.#length, 4]), encoded);
    const head = record([0x04034b50, 4], ...shared);
    this.#parts.push(head, encoded, file);
    this.#length += head.byteLength + encoded.length + size;
    if (this.#length > 0xfffffffe) throw new Error("The pictures are more than a ZIP file can have, 4 GB; save them one by one.");
  }

  get count() {
    return this.#names.size;
  }

  /** The ZIP file. */
  blob() {
    const size = this.#directory.reduce((sum, part) => sum + part.byteLength, 0), { count } = this;
    const end = record([0x06054b50, 4], [0, 2], [0, 2], [count, 2], [count, 2], [size, 4], [this.#length, 4], [0, 2]);
    return new Blob([...this.#parts, ...this.#directory, end], { type: "application/zip" });
  }
}
