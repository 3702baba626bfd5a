// Cells are painted with a pointer, or with arrow keys and space; props.value is then a "0" or "1" for each, row by row.
let at = 0, paints = null;
const cells = () => [...element.querySelectorAll(".cells i")];
const told = () => { props.value = cells().map((cell) => (cell.classList.contains("gone") ? "1" : "0")).join(""); };
watch("canvas", told); // over which nothing is painted yet
const under = (event) => {
  const box = element.querySelector(".cells").getBoundingClientRect(), side = Math.sqrt(cells().length);
  const place = (from, start, length) => Math.min(side - 1, Math.max(0, Math.floor(((from - start) / length) * side)));
  return place(event.clientY, box.top, box.height) * side + place(event.clientX, box.left, box.width);
};
element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".painter")) return;
  event.target.setPointerCapture?.(event.pointerId);
  const cell = cells()[under(event)];
  paints = !cell.classList.contains("gone");
  cell.classList.toggle("gone", paints);
});
element.addEventListener("pointermove", (event) => {
  if (paints !== null) cells()[under(event)].classList.toggle("gone", paints);
});
for (const name of ["pointerup", "pointercancel"]) {
  element.addEventListener(name, () => {
    if (paints !== null) told();
    paints = null;
  });
}
element.addEventListener("keydown", (event) => {
  const all = cells(), side = Math.sqrt(all.length);
  const moves = { ArrowLeft: at % side ? -1 : 0, ArrowRight: (at + 1) % side ? 1 : 0, ArrowUp: -side, ArrowDown: side };
  if (!event.target.closest(".painter") || !(event.key in moves || event.key === " ")) return;
  event.preventDefault();
  if (event.key === " ") {
    all[at].classList.toggle("gone");
    told();
  }
  const next = at + (moves[event.key] ?? 0);
  if (next >= 0 && next < all.length) at = next;
  all.forEach((cell, i) => cell.classList.toggle("cursor", i === at));
});
