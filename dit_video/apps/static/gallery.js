// The clips of this user, the newest first.
import { deleteItem, getItems } from "./api.js";
import { announce, byId, confirmInDialog, copyText, formatSize, make, makeButton, openDialog } from "./dom.js";
import { makePlayer, makeTile, TilePlayer } from "./player.js";

const PAGE = 24; // cards that are added at once
const FORMATS = { mp4: "MP4", webm: "WebM", gif: "GIF", apng: "Lossless" };

/** Return a name of a file from the words of a title, such as `a-red-circle-7.mp4`. */
function makeFileName(item, format) {
  const words = nameOf(item).toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["clip"];
  return `${words.join("-").slice(0, 60)}-${item.seed}.${item.frames === 1 && format === "apng" ? "png" : format}`;
}

const nameOf = (item) => item.title || item.tab_title;

export class Gallery {
  /** `makeActions` makes the buttons of an item; `onLoad` is called when items have changed. */
  constructor(makeActions, onLoad) {
    Object.assign(this, { makeActions, onLoad });
    this.items = new Map();
    this.version = null;
    this.limit = PAGE;
    this.cards = new Map();
    this.player = new TilePlayer();
    this.loaded = new Promise((resolve) => (this.resolveLoaded = resolve));
    this.build();
  }

  build() {
    const root = byId("gallery");
    const title = byId("gallery-title");
    this.count = make("span", { class: "count" });
    title.append(this.count);
    this.pause = this.player.makeButton();
    const head = make("div", { class: "section-head" });
    title.before(head);
    head.append(title, this.pause);
    this.problem = make("p", { class: "warning", role: "alert", hidden: true });
    this.empty = make("p", { class: "muted", textContent: "Clips that you generate are kept here, with all that is needed to make them again." });
    this.list = make("ul", { class: "cards" });
    this.more = makeButton("Show more", () => this.showMore(), { hidden: true });
    root.append(this.problem, this.empty, this.list, make("div", { class: "more" }, this.more));
  }

  /** Load the items if the gallery's version is another one. */
  async update(version) {
    if (version === this.version) return;
    this.version = version;
    try {
      this.items = new Map((await getItems()).map((item) => [item.id, item]));
      this.problem.hidden = true;
    } catch (error) {
      this.version = null; // try again with the next state
      this.problem.textContent = error.message;
      this.problem.hidden = false;
      return;
    }
    this.resolveLoaded();
    this.draw();
    this.onLoad();
  }

  async getItem(id) {
    await this.loaded;
    return this.items.get(id) ?? null;
  }

  draw() {
    const shown = [...this.items.values()].slice(0, this.limit);
    const ids = new Set(shown.map((item) => item.id));
    for (const [id, card] of this.cards) {
      if (ids.has(id)) continue;
      this.player.remove(card.tile);
      card.element.remove();
      this.cards.delete(id);
    }
    let before = null;
    for (const item of shown.reverse()) {
      if (!this.cards.has(item.id)) this.cards.set(item.id, this.makeCard(item));
      const { element } = this.cards.get(item.id);
      // A card that is moved would lose the focus.
      if (element.parentElement !== this.list || element.nextElementSibling !== before) this.list.insertBefore(element, before);
      before = element;
    }
    this.count.textContent = this.items.size || "";
    this.empty.hidden = this.items.size > 0;
    this.pause.hidden = !this.items.size;
    this.more.hidden = this.items.size <= this.limit;
  }

  showMore() {
    const last = [...this.list.children].at(-1);
    this.limit += PAGE;
    this.draw();
    last?.nextElementSibling?.querySelector("button")?.focus();
  }

  makeCard(item) {
    const name = nameOf(item);
    const tile = makeTile(item, "");
    const open = make("button", { type: "button", class: "open", "aria-label": `Details: ${name}, seed ${item.seed}`, on: { click: () => this.open(item) } }, tile.box);
    const text = make("div", { class: "card-text" }, make("h3", { class: "prompt", textContent: name }), make("p", { class: "small", textContent: `${item.tab_title} · ${formatSize(item)} · seed ${item.seed}` }));
    const element = make("li", { class: "item-card" }, open, text, make("div", { class: "actions" }, ...this.makeActions(item)));
    element.dataset.item = item.id;
    this.player.add(tile, element);
    return { element, tile };
  }

  /** Show an item with its recipe. */
  open(item) {
    const name = nameOf(item);
    const dialog = openDialog(name, { class: "viewer" });
    const close = (act) => () => {
      dialog.close();
      act();
    };
    const recipe = JSON.stringify(item.recipe, null, 2);
    const copies = [
      makeButton("Copy as Python", (event) => copyText(item.python, event.currentTarget)),
      makeButton("Copy as command", (event) => copyText(item.command, event.currentTarget)),
    ];
    const facts = [["Task", item.tab_title], ["Size", formatSize(item)], ["Frames per second", item.frames > 1 && item.fps], ["Seed", item.seed], ["Made", new Date(1000 * item.created).toLocaleString()]];
    const about = make(
      "div",
      { class: "viewer-text" },
      make("dl", { class: "facts" }, ...facts.filter(([, value]) => value !== false).map(([term, value]) => make("div", {}, make("dt", { textContent: term }), make("dd", { textContent: value })))),
      make("div", { class: "actions" }, ...this.makeActions(item, close)),
      make("h3", { textContent: "Make it again elsewhere" }),
      make("div", { class: "actions" }, ...copies),
      this.makeFiles("Files that they read", item.inputs.map(({ name: file, url }) => [file, url, file])),
      this.makeFiles("Download", Object.entries(FORMATS).filter(([format]) => item.files[format]).map(([format, title]) => [item.frames === 1 && format === "apng" ? "PNG" : title, item.files[format], makeFileName(item, format)])),
      this.makeText("Python", item.python),
      this.makeText("Command", item.command),
      this.makeText("Recipe", recipe),
      make("div", { class: "actions end" }, makeButton("Delete", () => this.remove(item, dialog), { class: "danger" })),
    );
    dialog.append(make("div", { class: "viewer-body" }, makePlayer(item, name), about));
  }

  makeText(title, text) {
    return make("details", {}, make("summary", { textContent: title }), make("pre", { textContent: text, tabIndex: 0, "aria-label": title }));
  }

  makeFiles(title, files) {
    if (!files.length) return null;
    return make("div", { class: "files" }, make("h3", { textContent: title }), make("p", { class: "actions" }, ...files.map(([title, url, name]) => make("a", { class: "button", href: url, download: name, textContent: title }))));
  }

  async remove(item, dialog) {
    if (!(await confirmInDialog("Delete this clip?", `“${nameOf(item)}”, seed ${item.seed}, cannot be brought back.`, "Delete"))) return;
    try {
      await deleteItem(item.id);
    } catch (error) {
      if (error.status !== 404) {
        dialog.append(make("p", { class: "warning", role: "alert", textContent: error.message }));
        return;
      }
    }
    dialog.close();
    this.items.delete(item.id);
    this.draw();
    this.onLoad();
    (this.list.querySelector("button") ?? byId("stage")).focus();
    announce("Deleted");
  }

  /** Let the user choose an item; resolve to null if none is chosen. */
  pick({ kind, title }) {
    return new Promise((resolve) => {
      let chosen = null;
      const items = [...this.items.values()].filter((item) => kind === "image" || item.frames > 1);
      const buttons = items.slice(0, 4 * PAGE).map((item) => {
        const { box, play, pause } = makeTile(item, "");
        const button = make("button", { type: "button", class: "open", on: { click: () => choose(item), pointerenter: play, pointerleave: pause } }, box, make("span", { class: "prompt", textContent: nameOf(item) }), make("span", { class: "small", textContent: `seed ${item.seed}` }));
        return make("li", { class: "item-card" }, button);
      });
      const list = buttons.length ? make("ul", { class: "cards" }, ...buttons) : make("p", { class: "muted", textContent: "The gallery is empty: generate a clip first, or choose a file." });
      const dialog = openDialog(`From the gallery: ${title}`, { class: "picker" }, list);
      const choose = (item) => {
        chosen = item;
        dialog.close();
      };
      dialog.addEventListener("close", () => resolve(chosen));
    });
  }
}
