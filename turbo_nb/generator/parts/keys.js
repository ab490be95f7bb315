// The keyboard within the page, and the title of the browser's tab.

export default {
  render({ model, el }) {
    let before = ""; // the title without ours
    let ours = "";
    const page = () => el.closest(".tnb");

    // on window, because JupyterLab takes keys at the document before the page sees them
    function press(event) {
      if (event.isComposing || event.repeat || !page()?.contains(event.target)) return;
      const wants = event.key === "Enter" && (event.ctrlKey || event.metaKey) ? "generate"
        : event.key === "Escape" && model.get("running") && !event.target.closest(".tnb-compare, details[open]") ? "cancel"
        : "";
      if (!wants) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      // the prompt goes with it, because the last letters may still wait to be sent
      model.send({ kind: wants, prompt: page().querySelector(".tnb-keys-prompt textarea")?.value });
    }

    function name() {
      const title = model.get("title");
      if (document.title !== ours) before = document.title; // JupyterLab has named another notebook
      ours = title ? `${title} · ${before}` : before;
      document.title = ours;
    }

    window.addEventListener("keydown", press, true);
    model.on("change:title", name);
    if (model.get("title")) name();
    return () => {
      window.removeEventListener("keydown", press, true);
      model.off("change:title", name);
      if (document.title === ours && ours) document.title = before;
    };
  },
};
