// A list of tabs after the pattern of the WAI-ARIA practices: arrow keys, Home and End choose a tab.
import { make } from "./dom.js";

/** Fill a tablist. `onSelect` is called with the name that the user chooses. */
export class Tabs {
  constructor(list, tabs, onSelect) {
    this.list = list;
    this.names = tabs.map((tab) => tab.name);
    this.buttons = new Map(
      tabs.map(({ name, title }) => {
        const properties = { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, textContent: title };
        return [name, make("button", { ...properties, on: { click: () => onSelect(name) } })];
      }),
    );
    list.append(...this.buttons.values());
    list.addEventListener("keydown", (event) => {
      const index = this.names.indexOf(this.selected), count = this.names.length;
      const next = { ArrowRight: index + 1, ArrowLeft: index - 1 + count, Home: 0, End: count - 1 }[event.key];
      if (next === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const name = this.names[next % count];
      onSelect(name);
      this.buttons.get(name).focus();
    });
  }

  /** Mark a tab as the selected one. */
  select(name) {
    this.selected = name;
    for (const [each, button] of this.buttons) {
      button.setAttribute("aria-selected", String(each === name));
      button.tabIndex = each === name ? 0 : -1;
    }
    // Along the list alone: the page does not move.
    const button = this.buttons.get(name);
    const { left, right } = button.getBoundingClientRect(), box = this.list.getBoundingClientRect();
    if (left < box.left || right > box.right) this.list.scrollLeft += (left + right) / 2 - (box.left + box.right) / 2;
  }
}
