"use strict";
// Sorts a table by the column whose heading is pressed. Without this script the page is whole, in our order.
function numberIn(text) {
  const told = text.trim().replace(/,/g, "").replace("−", "-");
  const unit = / (min|h)$/.exec(told);
  return parseFloat(told) * (unit ? { min: 60, h: 3600 }[unit[1]] : 1);
}
function compare(one, other) {
  const [a, b] = [numberIn(one), numberIn(other)];
  if (Number.isNaN(a) || Number.isNaN(b)) {
    return Number.isNaN(a) && Number.isNaN(b) ? one.localeCompare(other) : Number.isNaN(a) ? 1 : -1;
  }
  return a - b;
}
function sortBy(table, head, column) {
  const body = table.tBodies[0];
  const isUp = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) {
    other.removeAttribute("aria-sort");
  }
  head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
  const rows = [...body.rows].map((row) => [row.cells[column].textContent, row]);
  rows.sort((one, other) => compare(one[0], other[0]) * (isUp ? 1 : -1));
  body.append(...rows.map((pair) => pair[1]));
}
for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sortBy(table, head, column));
  });
}
// A printed page has no folded parts.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.printed")) {
    details.open = true;
  }
});
