// Rows of the data set: from the server, or from the page itself.
import { formatNumber, getCaptions } from "./browse_text.js";

/** Return a condition of an expression and of limits, in the language of data.where. */
export function formatWhere(expression, limits) {
  const parts = [...limits].map(([name, limit]) => formatLimit(name, limit));
  const own = expression.trim();
  if (!own) return parts.join(" and ");
  return [parts.length && /\bor\b/.test(own) ? `(${own})` : own, ...parts].join(" and ");
}

/** Return the condition of one limit, such as `5 <= motion <= 20`. */
export function formatLimit(name, { low = null, high = null, values = null }) {
  if (values === null) {
    if (low !== null && high !== null) return low === high ? `${name} == ${low}` : `${low} <= ${name} <= ${high}`;
    return low === null ? `${name} <= ${high}` : `${name} >= ${low}`;
  }
  if (typeof values[0] === "boolean") return values.length > 1 ? `(${name} or not ${name})` : values[0] ? name : `not ${name}`;
  return values.length === 1 ? `${name} == ${quote(values[0])}` : `${name} in [${values.map(quote).join(", ")}]`;
}

// JSON escapes control characters as Python does.
const quote = (text) => `'${JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll("'", "\\'")}'`;

/** Return the option of a command that uses a condition. */
export function formatOption(where) {
  return /["$`\\!]/.test(where) ? `data.where='${where.replaceAll("'", "'\\''")}'` : `data.where="${where}"`;
}

/** A data set that a server answers for. */
export class ServerSource {
  hasExpressions = true;

  getData = () => this.#request("api/data");
  getRow = (row) => this.#request(`api/rows/${row}`);

  getRows({ expression, limits, search, show, sort, descending, first, count, columns }) {
    const where = formatWhere(expression, limits);
    const values = { where, search, show, sort, descending, first, count, columns: columns.join(",") };
    return this.#request(`api/rows?${new URLSearchParams(values)}`);
  }

  getAddress = (task, { row, media }) => `media/${task}/${row}?v=${media}`;

  async #request(address) {
    let response;
    try {
      response = await fetch(address);
    } catch {
      throw new Error("The server does not answer. Is it running? Try again in a moment.");
    }
    const answer = await response.json().catch(() => ({ error: `The server answered with an error (${response.status}). Its terminal says more.` }));
    if (!response.ok) throw Object.assign(new Error(answer.error), { status: response.status });
    return answer;
  }
}

/** A data set that the page contains. */
export class StaticSource {
  hasExpressions = false;

  constructor({ data, rows }) {
    this.data = data;
    this.rows = rows;
    this.texts = rows.map((row) => [row.name, row.reason, ...getCaptions(row, data.captions).map(([, caption]) => caption)].join("\n").toLowerCase());
  }

  getData = async () => this.data;
  getRow = async (row) => this.rows[row];

  async getRows({ limits, search, show, sort, descending, first, count }) {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    const isMet = (row) => [...limits].every(([name, limit]) => meetsLimit(row[name], limit));
    const met = this.rows.filter(isMet);
    const kept = met.filter((row) => row.kept);
    const chosen = met.filter((row) => (show === "all" || row.kept === (show === "kept")) && words.every((word) => this.texts[row.row].includes(word)));
    const order = sort ? [...chosen].sort((a, b) => compare(a[sort], b[sort], descending)) : chosen;
    const seconds = kept.reduce((total, row) => total + (row.seconds ?? 0), 0);
    const counts = Object.fromEntries(this.data.columns.filter((column) => column.chart).map((column) => [column.name, countBins(chosen, column)]));
    return { total: order.length, selected: { clips: kept.length, seconds }, counts, rows: order.slice(first, first + count) };
  }

  getAddress = (task, { files }) => files?.[task] ?? null;
}

function meetsLimit(value, { low = null, high = null, values = null }) {
  if (value === null || value === undefined) return false;
  return values === null ? (low === null || value >= low) && (high === null || value <= high) : values.includes(value);
}

/** Order two values; missing ones come last in either direction. */
function compare(a, b, descending) {
  const missing = (value) => value === null || value === undefined;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = a < b ? -1 : a > b ? 1 : 0;
  return descending ? -order : order;
}

function countBins(rows, { name, edges, values }) {
  const counts = new Array((values.length || edges.length - 1) + 1).fill(0);
  for (const row of rows) {
    const value = row[name];
    let index = -1;
    if (value !== null && value !== undefined) {
      index = values.length ? values.indexOf(value) : Math.min(edges.findLastIndex((edge) => edge <= value), edges.length - 2);
    }
    counts[index < 0 ? counts.length - 1 : index] += 1;
  }
  return counts;
}

/** Return a limit as a short text, such as `≥ 5`. */
export function describeLimit({ low = null, high = null, values = null }) {
  if (values !== null) return values.map((value) => (typeof value === "boolean" ? (value ? "yes" : "no") : value || "(empty)")).join(", ");
  if (low !== null && high !== null) return `${formatNumber(low)} – ${formatNumber(high)}`;
  return low === null ? `≤ ${formatNumber(high)}` : `≥ ${formatNumber(low)}`;
}
