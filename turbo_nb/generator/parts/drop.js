// A clip that is dropped on the page or picked. Only its box `moov` goes to the kernel, which is small.

const LARGEST_MOOV = 8e6; // bytes; a message of a page may have 10 MB

// Return the content of a file's box `moov`, or null
async function moov(file) {
  for (let at = 0; at + 8 <= file.size; ) {
    const head = new DataView(await file.slice(at, at + 16).arrayBuffer());
    const kind = String.fromCharCode(...new Uint8Array(head.buffer, 4, 4));
    let [size, start] = [head.getUint32(0), 8];
    if (size === 1 && head.byteLength === 16) [size, start] = [Number(head.getBigUint64(8)), 16];
    if (size === 0) size = file.size - at;
    if (size < start) return null;
    if (kind === "moov") return size < LARGEST_MOOV ? file.slice(at + start, at + size).arrayBuffer() : null;
    at += size;
  }
  return null;
}

export default {
  render({ model, el }) {
    const pick = element("input", { type: "file", accept: "video/mp4,.mp4", "aria-label": "Restore the settings of a clip", onchange: () => {
      take(pick.files[0]);
      pick.value = "";
    } });
    const note = element("span", { class: "tnb-note", role: "status" });
    el.classList.add("tnb-part", "tnb-drop");
    el.append(element("label", { class: "tnb-pickfile" }, pick, element("span", { text: "Restore settings from a file…" })),
      element("span", { class: "tnb-hint", text: "or drop an mp4 on the page" }), note);

    async function take(file) {
      if (!file) return;
      const data = await moov(file).catch(() => null);
      model.send({ kind: "dropped", name: file.name }, undefined, [data ?? new ArrayBuffer(0)]);
    }

    const page = () => el.closest(".tnb");
    const isOurs = (event) => page()?.contains(event.target) && event.dataTransfer?.types.includes("Files") &&
      !event.target.closest("input[type=file], .jupyter-widgets.widget-upload");

    function over(event) {
      page()?.classList.toggle("tnb-over", Boolean(isOurs(event)));
      if (isOurs(event)) event.preventDefault(); // else the browser opens the file
    }

    function out(event) {
      if (!event.relatedTarget || !page()?.contains(event.relatedTarget)) page()?.classList.remove("tnb-over");
    }

    function drop(event) {
      page()?.classList.remove("tnb-over");
      if (!isOurs(event)) return;
      event.preventDefault();
      event.stopPropagation();
      take(event.dataTransfer.files[0]);
    }

    function told() {
      const { text = "", alert = false } = model.get("message");
      note.setAttribute("role", alert ? "alert" : "status");
      note.classList.toggle("tnb-alert", alert);
      note.textContent = text;
    }

    const listens = { dragover: over, dragleave: out, drop };
    for (const [name, call] of Object.entries(listens)) window.addEventListener(name, call, true);
    model.on("change:message", told);
    told();
    return () => {
      for (const [name, call] of Object.entries(listens)) window.removeEventListener(name, call, true);
      model.off("change:message", told);
    };
  },
};
