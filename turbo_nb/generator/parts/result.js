// The clip that was made last, large.

export default () => {
  let transfer;
  return {
    initialize({ model }) {
      transfer = new Transfer(model);
      return () => transfer.close();
    },
    render({ model, el }) {
      const video = element("video", { controls: true, loop: true, playsinline: true, hidden: true });
      video.muted = true;
      const empty = element("p", { class: "tnb-empty", text: "The clip plays here." });
      const note = element("p", { class: "tnb-note", role: "status" });
      const prompt = element("p", { class: "tnb-words" });
      const facts = element("p", { class: "tnb-facts" });
      const save = element("button", { type: "button", text: "Download", hidden: true, onclick: () => download() });
      el.classList.add("tnb-part", "tnb-result");
      el.append(element("div", { class: "tnb-screen" }, video, empty), note, prompt, facts, save);
      let shown = null; // key of the clip that plays

      async function show() {
        const { key, words = "", label = "", name = "" } = model.get("clip");
        prompt.textContent = words;
        facts.textContent = model.get("clip").facts ?? "";
        save.hidden = !key;
        save.setAttribute("aria-label", `Download ${name}`);
        video.setAttribute("aria-label", label);
        if (key === shown) {
          if (key && video.paused && !isCalm()) plays(video); // it was opened again
          return;
        }
        empty.hidden = Boolean(key);
        const wanted = () => model.get("clip").key === key;
        if (!key) {
          release();
          video.hidden = true;
          return;
        }
        try {
          const progress = (bytes, size) => (note.textContent = bytes < size ? `${megabytes(bytes)} of ${megabytes(size)}` : "");
          const url = await transfer.clip(key, { wanted, progress });
          if (!url || !wanted()) return;
          release();
          transfer.use((shown = key), 1);
          video.src = url;
          video.hidden = false;
          note.textContent = "";
          if (!isCalm()) plays(video);
        } catch (error) {
          note.textContent = error.message;
        }
      }

      function release() {
        if (shown) transfer.use(shown, -1);
        shown = null;
      }

      async function download() {
        const { key, name } = model.get("clip");
        await transfer.download(key, name).catch((error) => (note.textContent = error.message));
      }

      model.on("change:clip", show);
      show();
      return () => {
        model.off("change:clip", show);
        release();
        video.removeAttribute("src");
      };
    },
  };
};
