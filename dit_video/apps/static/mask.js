// The field of a mask: painted over the first frame of a clip, by pointer or by keyboard.
import { announce, make, makeButton, makeId } from "./dom.js";
import { Field } from "./fields.js";
import { MaskPixels } from "./mask_pixels.js";
import { fitInto } from "./player.js";

const TINT = [224, 49, 140, 150]; // RGBA: seen on dark and on light frames
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const FAR = 8; // pixels that the cursor moves with Shift
const HOW =
  "Arrow keys move the brush, with Shift by 8 pixels. Space paints; with the rectangle, it sets one corner and then the other. " +
  "E changes between brush and eraser. Control and Z take back the last change.";

/** A field of a mask over the clip of another field. */
export class MaskField extends Field {
  constructor(description) {
    super(description);
    this.source = null;
    this.mask = null;
    this.tool = "brush";
    this.body = make("div");
    this.layOutGroup(this.body);
    this.setMedia(null);
  }

  /** Follow the field whose clip is painted over. */
  follow(source) {
    this.source = source;
    source.onChange(() => this.setMedia(source.media));
    this.setMedia(source.media);
  }

  get controls() {
    return this.canvas ? [this.canvas] : [];
  }

  get value() {
    return this.mask?.count() ? { png: this.mask.toDataUrl() } : null;
  }

  async set(value) {
    this.wanted = value?.png ?? null;
    if (!this.mask) return;
    const { wanted, mask } = this;
    this.wanted = null;
    mask.fill(0);
    if (wanted) await mask.read(wanted);
    if (mask === this.mask) this.draw();
  }

  check() {
    if (!this.mask) return "Choose a clip, and paint over what is to be filled in.";
    return this.value ? "" : "Paint over what is to be filled in.";
  }

  focus() {
    this.canvas ? this.canvas.focus() : this.source?.focus();
  }

  setMedia(media) {
    const address = media?.files.png ?? null;
    if (this.body.childElementCount && address === this.address) return;
    this.address = address;
    const previous = this.mask;
    this.mask = null;
    this.canvas = null;
    if (!media) {
      this.body.replaceChildren(make("p", { class: "drop hint", textContent: "Choose a clip first; then paint here over what is to be filled in." }));
      return;
    }
    // Another clip of the same size keeps what is painted.
    const isSameSize = previous?.width === media.width && previous?.height === media.height;
    this.mask = isSameSize ? previous : new MaskPixels(media.width, media.height);
    this.cursor = { x: Math.floor(media.width / 2) + 0.5, y: Math.floor(media.height / 2) + 0.5 };
    this.corner = null;
    this.build(media);
    this.draw();
    if (this.wanted) this.set({ png: this.wanted });
  }

  build({ files, width, height }) {
    const how = make("p", { class: "unseen", id: makeId("how"), textContent: HOW });
    this.picture = make("img", { src: files.png, alt: "" });
    this.canvas = make("canvas", { width, height, tabIndex: 0, role: "application", "aria-label": "Mask over the first frame", "aria-describedby": how.id });
    this.ring = make("div", { class: "ring", hidden: true });
    this.layers = make("div", { class: "layers" }, this.picture, this.canvas, this.ring);
    const screen = make("div", { class: "screen mask-screen" }, this.layers);
    this.amount = make("p", { class: "help" });
    this.body.replaceChildren(this.makeTools(width, height), screen, this.amount, how);
    fitInto(screen, this.layers, width, height);
    this.listen();
  }

  makeTools(width, height) {
    const tools = { brush: "Brush", eraser: "Eraser", rectangle: "Rectangle" };
    this.toolButtons = Object.entries(tools).map(([name, title]) => {
      const button = makeButton(title, () => this.setTool(name), { class: "chip" });
      button.dataset.tool = name;
      return button;
    });
    const largest = Math.max(4, Math.round(Math.min(width, height) / 2));
    const size = make("input", { type: "range", id: makeId("brush"), min: 1, max: largest, step: 1, value: Math.max(2, Math.round(largest / 4)) });
    this.diameter = size;
    size.addEventListener("input", () => this.showRing());
    const change = (title, apply) =>
      makeButton(title, () => {
        apply();
        this.draw();
        this.change();
      });
    const changes = [
      change("Undo", () => this.mask.undo()),
      change("Clear", () => (this.mask.begin(), this.mask.fill(0))),
      change("Invert", () => (this.mask.begin(), this.mask.invert())),
    ];
    this.setTool(this.tool, true);
    return make(
      "div",
      { class: "mask-tools" },
      make("div", { class: "chips" }, ...this.toolButtons),
      make("div", { class: "brush-size" }, make("label", { htmlFor: size.id, textContent: "Brush size" }), size),
      make("div", { class: "actions" }, ...changes),
    );
  }

  setTool(name, isSilent = false) {
    this.tool = name;
    this.corner = null;
    for (const button of this.toolButtons) button.setAttribute("aria-pressed", String(button.dataset.tool === name));
    if (!isSilent) this.showRing();
  }

  /** Return the centre of the pixel below the pointer. */
  locate(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = (value, length, count) => Math.floor((value / length) * count) + 0.5;
    return { x: scale(event.clientX - box.left, box.width, this.mask.width), y: scale(event.clientY - box.top, box.height, this.mask.height) };
  }

  listen() {
    const { canvas } = this;
    let last = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      canvas.setPointerCapture(event.pointerId);
      this.mask.begin();
      last = this.cursor = this.locate(event);
      this.corner = this.tool === "rectangle" ? last : null;
      this.paint(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.cursor = this.locate(event);
      if (last) {
        // A rectangle is drawn anew from the corner where it began.
        if (this.corner) this.mask.data.set(this.mask.history.at(-1));
        this.paint(this.corner ?? last, this.cursor);
        last = this.cursor;
      }
      this.showRing();
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => {
        if (last) this.change();
        last = this.corner = null;
      });
    }
    canvas.addEventListener("pointerleave", () => (this.ring.hidden = canvas !== document.activeElement));
    canvas.addEventListener("focus", () => this.showRing());
    canvas.addEventListener("blur", () => (this.ring.hidden = true));
    canvas.addEventListener("keydown", (event) => this.press(event));
  }

  paint(from, to) {
    if (this.tool === "rectangle") this.mask.paintRectangle(from, to, 1);
    else this.mask.paintLine(from, to, Number(this.diameter.value), this.tool === "brush" ? 1 : 0);
    this.draw();
  }

  press(event) {
    const { key } = event;
    const isUndo = (event.ctrlKey || event.metaKey) && key.toLowerCase() === "z";
    if (isUndo) {
      this.mask.undo();
      this.draw();
      this.change();
      announce("Taken back");
    } else if (event.ctrlKey || event.metaKey || event.altKey) {
      return;
    } else if (key in KEYS) {
      const distance = event.shiftKey ? FAR : 1;
      const move = (at, by, count) => Math.min(count - 0.5, Math.max(0.5, at + by * distance));
      this.cursor = { x: move(this.cursor.x, KEYS[key][0], this.mask.width), y: move(this.cursor.y, KEYS[key][1], this.mask.height) };
      this.say();
    } else if (key === " ") {
      this.pressSpace();
    } else if (key.toLowerCase() === "e") {
      this.setTool(this.tool === "eraser" ? "brush" : "eraser");
      announce(this.tool);
    } else {
      return;
    }
    event.preventDefault();
    this.showRing();
  }

  pressSpace() {
    if (this.tool === "rectangle" && !this.corner) {
      this.corner = this.cursor;
      announce("First corner");
      return;
    }
    this.mask.begin();
    this.paint(this.corner ?? this.cursor, this.cursor);
    this.corner = null;
    this.change();
    announce(`Done. ${this.amount.textContent}`);
  }

  say() {
    const { x, y } = this.cursor;
    announce(`Column ${Math.ceil(x)}, row ${Math.ceil(y)}, ${this.mask.has(x, y) ? "painted" : "not painted"}`);
  }

  /** Show the outline of what the brush would paint. */
  showRing() {
    if (!this.mask) return;
    const { x, y } = this.cursor;
    const size = this.tool === "rectangle" ? 1 : Number(this.diameter.value);
    const { style } = this.ring;
    style.left = `${(100 * (x - size / 2)) / this.mask.width}%`;
    style.top = `${(100 * (y - size / 2)) / this.mask.height}%`;
    style.width = `${(100 * size) / this.mask.width}%`;
    style.height = `${(100 * size) / this.mask.height}%`;
    this.ring.classList.toggle("square", this.tool === "rectangle");
    this.ring.hidden = false;
  }

  draw() {
    this.mask.draw(this.canvas.getContext("2d"), TINT, [0, 0, 0, 0]);
    const part = (100 * this.mask.count()) / this.mask.data.length;
    this.amount.textContent = part ? `${part < 1 ? "Less than 1" : Math.round(part)} % of the picture will be filled in.` : "Nothing is painted yet.";
  }
}
