// Texts of values.

/** Return a number with at most four significant digits, and thousands apart. */
export function formatNumber(value) {
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? value.toLocaleString("en") : value.toExponential(3);
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

/** Return seconds as hours, minutes or seconds. */
export function formatDuration(seconds) {
  if (seconds >= 3600) return `${formatNumber(Number((seconds / 3600).toFixed(seconds < 36000 ? 2 : 1)))} h`;
  if (seconds >= 60) return `${(seconds / 60).toFixed(1)} min`;
  return `${Number(seconds.toFixed(1))} s`;
}

/** Return any value as text. */
export function formatValue(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map(formatValue).join(", ");
  return typeof value === "number" ? formatNumber(value) : String(value);
}

/** Return the name of a column as a title: `audio_rate` as `audio rate`. */
export const formatTitle = (name) => name.replaceAll("_", " ");

/** Return the captions of a row in the columns of these names, as pairs of a column and a caption. */
export function getCaptions(row, names) {
  return names.flatMap((name) => [row[name] ?? []].flat().filter(Boolean).map((caption) => [name, caption]));
}

export const countClips = (count) => `${formatNumber(count)} clip${count === 1 ? "" : "s"}`;
