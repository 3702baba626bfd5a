// A picture is chosen by pressing one, or by a file that is picked, dropped or pasted, which is sent as a data URL.
const press = (chosen) =>
  element.querySelectorAll("button[data-row]").forEach((button) => button.setAttribute("aria-pressed", button === chosen));
const send = (file) => {
  if (!file) return;
  press(null);
  if (file.size > props.most) return trigger("upload", { size: file.size });
  const reader = new FileReader();
  reader.onload = () => trigger("upload", { file: reader.result, size: file.size });
  reader.readAsDataURL(file);
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-row]");
  if (!button) return;
  press(button);
  trigger("select", { row: Number(button.dataset.row) });
});
element.addEventListener("change", (event) => {
  send(event.target.files[0]);
  event.target.value = ""; // so that the same file can be given again
});
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => {
  event.preventDefault();
  send(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => send(event.clipboardData.files[0]));
