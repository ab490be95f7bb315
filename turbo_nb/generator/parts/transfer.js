// Clips and posters come from the kernel in messages, because a page can open no file outside the notebook's folder.

const PATIENCE = 60000; // ms after which an answer is taken for lost, for example because the kernel has restarted
const KEPT = 200e6; // bytes of clips that the page keeps
const LARGEST = 1e9; // bytes of a download, which stands in the browser's memory

class Transfer {
  constructor(model) {
    this.model = model;
    this.count = 0;
    this.waiting = new Map();
    this.clips = new Map(); // by key: pieces, bytes, url; the one that was asked for last is the last
    this.posters = new Map();
    model.on("msg:custom", (content, buffers) => {
      const waits = this.waiting.get(content.id);
      this.waiting.delete(content.id);
      if (waits) content.error ? waits.reject(new Error(content.error)) : waits.resolve([content, buffers]);
    });
  }

  // Ask the kernel, and wait for its answer
  ask(content, buffers) {
    const id = `${Date.now()}-${this.count++}`;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      setTimeout(() => this.waiting.delete(id) && reject(new Error("The kernel does not answer.")), PATIENCE);
      this.model.send({ ...content, id }, undefined, buffers);
    });
  }

  // Return the address of a file's bytes, or null if nobody wants them any more. What has arrived is kept.
  async clip(key, { wanted = () => true, progress = () => {} } = {}) {
    const entry = this.clips.get(key) ?? { pieces: [], bytes: 0, url: null, users: 0 };
    this.clips.delete(key);
    this.clips.set(key, entry);
    while (!entry.url) {
      if (!wanted()) return null;
      entry.coming ??= this.ask({ kind: "bytes", key, start: entry.bytes }).finally(() => (entry.coming = null));
      const at = entry.bytes;
      const [{ size }, [piece]] = await entry.coming;
      if (entry.bytes === at) {
        entry.pieces.push(piece); // else another view has taken this piece
        entry.bytes += piece.byteLength;
      }
      progress(entry.bytes, size);
      if (entry.bytes >= size) {
        entry.url ??= URL.createObjectURL(new Blob(entry.pieces, { type: "video/mp4" }));
        entry.pieces = [];
      } else if (!piece.byteLength) throw new Error("The file became shorter.");
    }
    this.#forget();
    return entry.url;
  }

  // While a file is in use, its bytes stay
  use(key, by) {
    const entry = this.clips.get(key);
    if (entry) entry.users += by;
  }

  #forget() {
    let bytes = [...this.clips.values()].reduce((sum, entry) => sum + entry.bytes, 0);
    for (const [key, entry] of [...this.clips].slice(0, -1)) {
      if (bytes <= KEPT) break;
      if (entry.users || entry.coming) continue;
      if (entry.url) URL.revokeObjectURL(entry.url);
      this.clips.delete(key);
      bytes -= entry.bytes;
    }
  }

  // Return the address of a clip's first frame
  poster(key) {
    if (!this.posters.has(key)) {
      const made = this.ask({ kind: "poster", key }).then(([, [data]]) =>
        URL.createObjectURL(new Blob([data], { type: "image/jpeg" })));
      made.catch(() => this.posters.delete(key));
      this.posters.set(key, made);
    }
    return this.posters.get(key);
  }

  // Let the browser save a file
  async download(key, name, progress) {
    const url = await this.clip(key, { progress });
    element("a", { href: url, download: name }).click();
  }

  close() {
    for (const { url } of this.clips.values()) if (url) URL.revokeObjectURL(url);
    for (const poster of this.posters.values()) poster.then(URL.revokeObjectURL, () => {});
  }
}

// Make an element. All text enters the page by textContent, so that it is never read as HTML.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "text") made.textContent = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const megabytes = (bytes) => (bytes < 1e5 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const plays = (video) => video.play().catch(() => {}); // a browser may refuse to play before the first click
