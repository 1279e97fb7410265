/** A tab list for one panel, after the WAI-ARIA tabs pattern: arrow keys move between tabs, Tab leaves the list. */

import { make } from "./dom.js";

const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

/**
 * Fills a tab list.
 * @param {HTMLElement} list
 * @param {HTMLElement} panel
 * @param {{id: string, title: string}[]} entries
 * @param {(id: string) => void} onSelect
 */
export function fillTabs(list, panel, entries, onSelect) {
  const tabs = entries.map(({ id, title }) =>
    make("button", { type: "button", id: `tab-${id}`, textContent: title, role: "tab", "aria-controls": panel.id, onclick: () => select(id) }),
  );
  const select = (id) => {
    for (const tab of tabs) mark(tab, tab.id === `tab-${id}`);
    panel.setAttribute("aria-labelledby", `tab-${id}`);
    onSelect(id);
  };
  list.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const next = tabs[Math.max(0, Math.min(tabs.indexOf(document.activeElement) + step, tabs.length - 1))];
    next.focus();
    next.click();
  });
  list.replaceChildren(...tabs);
  select(entries[0].id);
}

function mark(tab, isSelected) {
  tab.setAttribute("aria-selected", String(isSelected));
  tab.tabIndex = isSelected ? 0 : -1;
}
