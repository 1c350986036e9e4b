(() => {
  "use strict";
  const all = (selector) => [...document.querySelectorAll(selector)];

  // A playing image cannot be stopped, so a still of it takes its place.
  const still = (image) => {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
  };
  const moving = new Map();
  const setPaused = (paused) => {
    for (const image of all("img.loop")) {
      if (paused && image.complete && image.naturalWidth) {
        moving.set(image, image.src);
        image.src = still(image);
      } else if (!paused && moving.has(image)) {
        image.src = moving.get(image);
      }
    }
    for (const video of all("video")) paused ? video.pause() : video.play();
  };
  const pause = document.getElementById("pause");
  if (pause) {
    const toggle = () => {
      const paused = pause.getAttribute("aria-pressed") !== "true";
      pause.setAttribute("aria-pressed", String(paused));
      pause.textContent = paused ? "Play" : "Pause";
      setPaused(paused);
    };
    pause.addEventListener("click", toggle);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) addEventListener("load", toggle);
  }

  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  for (const button of all("[data-filter]")) {
    button.addEventListener("click", () => {
      const name = button.dataset.filter;
      for (const other of all("[data-filter]")) other.setAttribute("aria-pressed", String(other === button));
      for (const card of all("#samples .card")) card.hidden = name !== "all" && !(name in card.dataset);
      for (const group of all("#samples .group")) group.hidden = !group.querySelector(".card:not([hidden])");
    });
  }

  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
})();
