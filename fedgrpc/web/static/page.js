// What every page does: count down the time that is left, and leave the rest to the server.

export function countDown(root) {
  const due = performance.now();
  for (const element of root.querySelectorAll("[data-left]")) {
    element.dataset.dueAt = due + 1000 * Number(element.dataset.left);
  }
}

function told(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

countDown(document);
setInterval(() => {
  for (const element of document.querySelectorAll("[data-due-at]")) {
    element.textContent = told((Number(element.dataset.dueAt) - performance.now()) / 1000);
  }
}, 1000);
