// The clips of the folder, in pages. The kernel gives the clips of a page; this file draws only what has changed.

const HOVER = 120; // ms that the pointer stays on a poster before the clip plays
const ORDERS = { newest: "Newest first", oldest: "Oldest first", prompt: "By prompt", slowest: "Slowest first" };

export default () => {
  let transfer;
  return {
    initialize({ model }) {
      transfer = new Transfer(model);
      return () => transfer.close();
    },
    render: ({ model, el }) => render(model, el, transfer),
  };
};

function render(model, el, transfer) {
  const cards = new Map(); // by key
  const selected = new Map(); // name to item, also of other pages
  const sends = (content) => model.send(content);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const press = (text, onclick, more = {}) => element("button", { type: "button", text, onclick, ...more });

  // Controls
  const search = element("input", {
    type: "search", placeholder: "Search the prompts", "aria-label": "Search the prompts", oninput: later(() => {
      model.set("page", 0);
      set("words", search.value);
    }, 250),
  });
  const order = element("select", {
    "aria-label": "Order of the clips", onchange: () => {
      model.set("page", 0);
      set("order", order.value);
    },
  }, ...Object.entries(ORDERS).map(([value, text]) => element("option", { value, text })));
  const starred = press("★ Starred", () => {
    model.set("page", 0);
    set("starred", !model.get("starred"));
  }, { "aria-label": "Only clips with a star" });
  const count = element("span", { class: "tnb-count", role: "status" });
  const before = press("‹ Previous", () => set("page", model.get("page") - 1), { "aria-label": "Previous page" });
  const after = press("Next ›", () => set("page", model.get("page") + 1), { "aria-label": "Next page" });
  const where = element("span");
  const pager = element("nav", { class: "tnb-row", "aria-label": "Pages of clips" }, before, where, after);
  const chosen = element("span", { role: "status" });
  const all = press("Select page", () => {
    const items = model.get("items");
    const every = items.every((item) => selected.has(item.name));
    for (const item of items) every ? selected.delete(item.name) : selected.set(item.name, item);
    selection();
  });
  const compare = press("Compare", () => comparing());
  const zip = press("Zip", () => sends({ kind: "zip", names: [...selected.keys()] }));
  const remove = press("Delete", confirmed(
    () => selected.size > 1 ? `Delete ${selected.size} for good?` : "Delete for good?",
    () => sends({ kind: "delete", names: [...selected.keys()] }),
  ));
  const none = press("Clear selection", () => {
    selected.clear();
    selection();
  });
  const message = element("p", { class: "tnb-note" });
  const archive = element("p", { class: "tnb-row", hidden: true });
  const stage = element("div");
  const list = element("ul", { class: "tnb-clips", "aria-label": "Finished clips" });
  el.classList.add("tnb-part", "tnb-gallery");
  el.append(
    element("div", { class: "tnb-row", role: "group", "aria-label": "Find clips" }, search, order, starred, count),
    element("div", { class: "tnb-row", role: "group", "aria-label": "Selected clips" },
      all, compare, zip, remove, none, chosen),
    message, archive, stage, list, pager,
  );

  // Draw the page: cards that stay are moved, not made anew, so that their clips play on
  function draw() {
    const items = model.get("items");
    const gone = new Map(cards);
    items.forEach((item, index) => {
      const made = cards.get(item.key) ?? card(item);
      cards.set(item.key, made);
      gone.delete(item.key);
      made.update(item);
      if (list.children[index] !== made.root) list.insertBefore(made.root, list.children[index] ?? null);
    });
    for (const [key, made] of gone) {
      made.close();
      cards.delete(key);
    }
    const { total, pages, page } = { total: model.get("total"), pages: model.get("pages"), page: model.get("page") };
    count.textContent = total === 1 ? "1 clip" : `${total.toLocaleString("en")} clips`;
    if (!total) {
      const any = model.get("words") || model.get("starred");
      count.textContent = any ? "No clip fits" : "Nothing yet. What you generate is kept here.";
    }
    where.textContent = `Page ${page + 1} of ${pages}`;
    before.disabled = page <= 0;
    after.disabled = page >= pages - 1;
    pager.hidden = pages <= 1;
    if (document.activeElement !== search) search.value = model.get("words");
    order.value = model.get("order");
    starred.setAttribute("aria-pressed", model.get("starred"));
    selection();
  }

  function selection() {
    const number = selected.size;
    const items = model.get("items");
    chosen.textContent = number ? `${number} selected` : items.length > 1 ? "Tick two clips to compare them." : "";
    all.hidden = !items.length;
    all.textContent = items.length && items.every((item) => selected.has(item.name)) ? "Unselect page" : "Select page";
    compare.hidden = remove.hidden = none.hidden = !number;
    compare.disabled = number !== 2;
    compare.title = number === 2 ? "Play both in step" : "Select two clips";
    zip.textContent = number ? "Zip" : "Zip all clips";
    zip.hidden = !number && !items.length;
    if (remove.reset) remove.reset();
    for (const made of cards.values()) made.select();
  }

  async function comparing() {
    const pair = [...selected.values()];
    say("Loading both clips…");
    try {
      const urls = await Promise.all(pair.map((item) => transfer.clip(item.key)));
      say("");
      pair.forEach((item) => transfer.use(item.key, 1));
      stage.replaceChildren(comparison(urls, pair, () => {
        pair.forEach((item) => transfer.use(item.key, -1));
        compare.focus();
      }));
      stage.firstChild.focus();
    } catch (error) {
      say(error.message, true);
    }
  }

  function say(text, alert = false) {
    message.setAttribute("role", alert ? "alert" : "status");
    message.classList.toggle("tnb-alert", alert);
    message.textContent = text;
  }

  // Bring what an action has changed into view: the form, or the clip that plays large
  function rise(target) {
    if (target?.getBoundingClientRect().top < window.innerHeight * 0.1) // else it is in view
      target.scrollIntoView({ block: "start", behavior: isCalm() ? "auto" : "smooth" });
  }

  // A clip: its poster, which plays while the pointer or the focus is on it, and its buttons
  function card(first) {
    let item = first;
    let video = null;
    let timer = 0;
    let over = false;
    const poster = element("img", { alt: "", hidden: true });
    const screen = element("button", { type: "button", class: "tnb-poster", onclick: () => act("open") }, poster);
    const star = press("☆", () => sends({ kind: "star", name: item.name, on: !item.star }), { class: "tnb-star" });
    const box = element("input", {
      type: "checkbox", class: "tnb-pick", onchange: () => {
        box.checked ? selected.set(item.name, item) : selected.delete(item.name);
        selection();
      },
    });
    const words = element("p", { class: "tnb-prompt" });
    const facts = element("p", { class: "tnb-facts" });
    const actions = element("div", { class: "tnb-row" });
    const more = element("details", { class: "tnb-more" }, element("summary", { text: "More" }));
    const root = element("li", { class: "tnb-clip" },
      element("div", { class: "tnb-frame" }, screen, box, star), words, facts, actions);
    const act = (name) => {
      more.open = false;
      sends({ kind: "act", action: name, name: item.name });
      const page = el.closest(".tnb");
      rise(name === "open" ? page?.querySelector(".tnb-large") : page);
    };

    screen.addEventListener("pointerenter", begin);
    screen.addEventListener("pointerleave", stop);
    screen.addEventListener("focus", () => screen.matches(":focus-visible") && begin());
    screen.addEventListener("blur", stop);

    transfer.poster(item.key).then((url) => {
      poster.src = url;
      poster.hidden = false;
    }, () => screen.classList.add("tnb-none"));

    function begin() {
      over = true;
      if (!isCalm()) timer = setTimeout(play, HOVER);
    }

    async function play() {
      try {
        screen.classList.add("tnb-loading");
        const url = await transfer.clip(item.key, { wanted: () => over });
        if (!url || !over || video) return;
        video = element("video", { src: url, loop: true, playsinline: true, "aria-hidden": "true" });
        video.muted = true;
        transfer.use(item.key, 1);
        screen.append(video);
        plays(video);
      } catch (error) {
        say(error.message, true);
      } finally {
        screen.classList.remove("tnb-loading");
      }
    }

    function stop() {
      over = false;
      clearTimeout(timer);
      if (!video) return;
      transfer.use(item.key, -1);
      video.removeAttribute("src");
      video.remove();
      video = null;
    }

    function update(next) {
      if (JSON.stringify([next, model.get("actions")]) === root.dataset.drawn) return;
      root.dataset.drawn = JSON.stringify([next, model.get("actions")]);
      item = next;
      if (selected.has(item.name)) selected.set(item.name, item);
      screen.setAttribute("aria-label", `Show large: ${item.label}`);
      screen.title = "Show large";
      box.setAttribute("aria-label", `Select: ${item.label}`);
      star.textContent = item.star ? "★" : "☆";
      star.setAttribute("aria-label", `Star: ${item.label}`);
      star.setAttribute("aria-pressed", item.star);
      words.textContent = item.words;
      words.title = item.words;
      facts.textContent = item.facts;
      const offered = model.get("actions").map(([name, label]) =>
        press(label, () => act(name), { "aria-label": `${label}: ${item.name}` }));
      actions.replaceChildren(...offered.slice(0, 1), more);
      more.replaceChildren(more.firstChild, element("div", { class: "tnb-menu" }, ...offered.slice(1),
        press("Download", () => save(item.key, item.name), { "aria-label": `Download: ${item.name}` }),
        press("Delete", confirmed(() => "Delete for good?", () => sends({ kind: "delete", names: [item.name] })),
          { "aria-label": `Delete: ${item.name}` })));
      more.firstChild.setAttribute("aria-label", `More: ${item.name}`);
    }

    return {
      root,
      update,
      select: () => {
        box.checked = selected.has(item.name);
        root.classList.toggle("tnb-selected", box.checked);
      },
      close: () => {
        stop();
        root.remove();
      },
    };
  }

  async function save(key, name) {
    try {
      await transfer.download(key, name, (bytes, size) => say(bytes < size ? `${megabytes(bytes)} of ${megabytes(size)}` : ""));
    } catch (error) {
      say(error.message, true);
    }
  }

  function packed() {
    const { name, path, size, key } = model.get("archive");
    archive.hidden = !name;
    if (!name) return;
    const text = size > LARGEST ? "It is too large for the browser. Copy it from its folder." : "";
    archive.replaceChildren(
      ...(text ? [] : [press(`Download ${name} (${megabytes(size)})`, () => save(key, name))]),
      element("span", { text: `${path} ${text}`.trim() }));
  }

  function told() {
    const { text = "", alert = false } = model.get("message");
    say(text, alert);
  }

  function forgotten() {
    const names = new Set(model.get("gone"));
    for (const name of names) selected.delete(name);
    selection();
  }

  const changes = {
    "change:items change:total change:pages change:page change:actions change:starred": later(draw, 0),
    "change:message": told, "change:archive": packed, "change:gone": forgotten,
  };
  for (const [events, call] of Object.entries(changes)) model.on(events, call);
  el.addEventListener("pointerdown", (event) => {
    for (const menu of list.querySelectorAll("details[open]")) if (!menu.contains(event.target)) menu.open = false;
  });
  draw();
  told();
  packed();
  return () => {
    for (const [events, call] of Object.entries(changes)) model.off(events, call);
    for (const made of cards.values()) made.close();
  };
}

// Return a function that calls another a moment after its latest call
function later(call, wait) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(call, wait);
  };
}

// Return what a button does that asks first: the first click changes its text, the second one counts
function confirmed(question, does) {
  return (event) => {
    const button = event.currentTarget;
    if (button.classList.contains("tnb-sure")) {
      button.reset();
      does();
      return;
    }
    const [text, label] = [button.textContent, button.getAttribute("aria-label")];
    button.reset = () => {
      button.classList.remove("tnb-sure");
      button.textContent = text;
      if (label) button.setAttribute("aria-label", label);
      button.reset = null;
    };
    button.addEventListener("blur", () => button.reset?.(), { once: true });
    button.classList.add("tnb-sure");
    button.textContent = question();
    if (label) button.setAttribute("aria-label", `${button.textContent} ${label}`);
  };
}
