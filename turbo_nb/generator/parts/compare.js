// Two clips side by side, in lock step: one button, one position.

const APART = 0.04; // seconds that two clips may be apart, about half a frame

// Return an element that compares two clips. urls: of the clips' bytes, items: of the gallery.
function comparison(urls, items, close) {
  const videos = urls.map((url, index) =>
    element("video", { src: url, playsinline: true, preload: "auto", "aria-label": items[index].label }));
  for (const video of videos) video.muted = true;
  const button = element("button", { type: "button", class: "tnb-play", text: "Play", onclick: toggle });
  const range = element("input", {
    type: "range", min: 0, max: 1, step: "any", value: 0, "aria-label": "Position in both clips", oninput: seek,
  });
  const clock = element("output", { text: "0.00 s" });
  const box = element(
    "section", { class: "tnb-compare", "aria-label": "Compare two clips", tabindex: -1 },
    element("div", { class: "tnb-pair" }, ...videos.map((video, index) =>
      element("figure", {}, video, element("figcaption", { text: items[index].label }),
        element("p", { class: "tnb-facts", text: items[index].facts })))),
    element("div", { class: "tnb-row" }, button, range, clock,
      element("button", { type: "button", text: "Close", "aria-label": "Close the comparison", onclick: end })),
  );
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") end();
    else return;
    event.stopPropagation();
  });
  let playing = false;
  let frame = 0;

  const length = () => Math.max(...videos.map((video) => video.duration || 0));
  const leader = () => (videos[1].duration > videos[0].duration ? videos[1] : videos[0]); // the longer one
  const show = (time) => {
    range.value = time;
    range.setAttribute("aria-valuetext", `${time.toFixed(2)} of ${length().toFixed(2)} seconds`);
    clock.textContent = `${time.toFixed(2)} s`;
  };

  // Put both at a time; the shorter clip stays at its last frame
  function put(time) {
    for (const video of videos) {
      const target = Math.min(time, Math.max(0, video.duration - 0.001));
      if (Math.abs(video.currentTime - target) > 1e-4) video.currentTime = target;
    }
    show(time);
  }

  function seek() {
    pause();
    put(Number(range.value));
  }

  async function play() {
    playing = true;
    button.textContent = "Pause";
    if (leader().currentTime >= length() - APART) put(0);
    else put(leader().currentTime);
    await Promise.all(videos.map(plays));
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(follow);
  }

  function pause() {
    playing = false;
    cancelAnimationFrame(frame);
    button.textContent = "Play";
    for (const video of videos) video.pause();
  }

  function toggle() {
    if (!playing) return play();
    pause();
    put(leader().currentTime);
  }

  // While both play, hold the other at the leader's position, and begin again with it
  function follow() {
    if (!playing) return;
    const first = leader();
    const other = videos[0] === first ? videos[1] : videos[0];
    if (first.ended) {
      put(0);
      videos.forEach(plays);
    } else if (first.currentTime < other.duration) {
      if (Math.abs(first.currentTime - other.currentTime) > APART) other.currentTime = first.currentTime;
      if (other.paused) plays(other);
    }
    show(first.currentTime);
    frame = requestAnimationFrame(follow);
  }

  function end() {
    pause();
    for (const video of videos) video.removeAttribute("src");
    box.remove();
    close();
  }

  const ready = () => {
    range.max = length();
    if (videos.some((video) => video.readyState < 1)) return;
    isCalm() ? put(0) : play();
    box.scrollIntoView({ block: "nearest" }); // now that the videos have their height
  };
  for (const video of videos) video.addEventListener("loadedmetadata", ready, { once: true });
  return box;
}
