// Pixels of a mask, and how they are painted.

const MAX_UNDO = 50;

/** A mask of width × height pixels: 1 is painted. Coordinates are in pixels, (0, 0) is the upper left corner. */
export class MaskPixels {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.data = new Uint8Array(width * height);
    this.history = [];
  }

  /** Begin a change that `undo` takes back as one. */
  begin() {
    this.history.push(this.data.slice());
    if (this.history.length > MAX_UNDO) this.history.shift();
  }

  undo() {
    const last = this.history.pop();
    if (last) this.data = last;
    return Boolean(last);
  }

  /** Paint all pixels whose centre is within a radius of a line. */
  paintLine(from, to, diameter, value) {
    const radius = Math.max(diameter, 1) / 2;
    const [dx, dy] = [to.x - from.x, to.y - from.y];
    const length = dx * dx + dy * dy;
    this.paintBox(
      Math.floor(Math.min(from.x, to.x) - radius), Math.floor(Math.min(from.y, to.y) - radius),
      Math.floor(Math.max(from.x, to.x) + radius), Math.floor(Math.max(from.y, to.y) + radius),
      (x, y) => {
        const along = length ? Math.min(1, Math.max(0, ((x - from.x) * dx + (y - from.y) * dy) / length)) : 0;
        const distance = Math.hypot(x - from.x - along * dx, y - from.y - along * dy);
        // Half a pixel more for the thinnest brush: a line of it has no gaps.
        return distance <= Math.max(radius, 0.71);
      },
      value,
    );
  }

  /** Paint the pixels of a rectangle between two corners. */
  paintRectangle(from, to, value) {
    const [left, right] = [from.x, to.x].sort((a, b) => a - b).map(Math.floor);
    const [top, bottom] = [from.y, to.y].sort((a, b) => a - b).map(Math.floor);
    this.paintBox(left, top, right, bottom, () => true, value);
  }

  paintBox(left, top, right, bottom, isInside, value) {
    for (let y = Math.max(top, 0); y <= Math.min(bottom, this.height - 1); y++) {
      for (let x = Math.max(left, 0); x <= Math.min(right, this.width - 1); x++) {
        if (isInside(x + 0.5, y + 0.5)) this.data[y * this.width + x] = value;
      }
    }
  }

  fill(value) {
    this.data.fill(value);
  }

  invert() {
    for (let index = 0; index < this.data.length; index++) this.data[index] = 1 - this.data[index];
  }

  /** Return the number of painted pixels. */
  count() {
    return this.data.reduce((sum, value) => sum + value, 0);
  }

  has(x, y) {
    return this.data[Math.floor(y) * this.width + Math.floor(x)] === 1;
  }

  /** Draw the mask into a context of its size: RGBA colours of painted and other pixels. */
  draw(context, painted, other) {
    const image = context.createImageData(this.width, this.height);
    for (let index = 0; index < this.data.length; index++) image.data.set(this.data[index] ? painted : other, 4 * index);
    context.putImageData(image, 0, 0);
  }

  /** Return a PNG as a data URL: painted pixels are white, others black. */
  toDataUrl() {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.width, this.height];
    this.draw(canvas.getContext("2d"), [255, 255, 255, 255], [0, 0, 0, 255]);
    return canvas.toDataURL("image/png");
  }

  /** Read a PNG of the same size from a data URL; one of another size is left out. */
  async read(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    if (image.naturalWidth !== this.width || image.naturalHeight !== this.height) return;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.width, this.height];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, this.width, this.height);
    for (let index = 0; index < this.data.length; index++) this.data[index] = data[4 * index] > 127 ? 1 : 0;
  }
}
