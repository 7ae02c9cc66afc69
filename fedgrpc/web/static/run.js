// A run while it goes on: the server sends what has changed, once a second at most.

import { countDown } from "./page.js";
import { drawCharts } from "./charts.js";

const page = document.getElementById("run");
const live = document.getElementById("live");
const lost = document.getElementById("lost");
const path = page.dataset.run;
let mark = null;
let source = null;
let over = false;

// Keeps the keyboard's place where a link in the changing part has it.
function replaceLive(html) {
  const link = live.contains(document.activeElement) && document.activeElement.getAttribute("href");
  live.innerHTML = html;
  countDown(live);
  if (link) [...live.querySelectorAll("a")].find((each) => each.getAttribute("href") === link)?.focus();
}

async function refreshRounds() {
  const answer = await fetch(`${path}/rounds`);
  const body = document.querySelector("#rounds tbody");
  if (!answer.ok) return;
  if (body) body.innerHTML = await answer.text();
  else location.reload();
}

async function drawSeries() {
  const answer = await fetch(`${path}/series.json`);
  if (answer.ok) drawCharts(document.getElementById("charts"), await answer.json());
}

function listen() {
  if (source || over) return;
  source = new EventSource(`${path}/live`);
  source.onmessage = (event) => {
    const news = JSON.parse(event.data);
    lost.hidden = true;
    replaceLive(news.html);
    if (mark !== null && mark !== news.mark) {
      refreshRounds();
      drawSeries();
    }
    mark = news.mark;
    if (news.ended) {
      over = true;
      hush();
    }
  };
  source.onerror = () => {
    lost.hidden = over;
    // A refusal ends the stream for good; a lost connection is tried again by the browser itself.
    if (source?.readyState === EventSource.CLOSED) {
      hush();
      setTimeout(listen, 5000);
    }
  };
}

function hush() {
  source?.close();
  source = null;
}

// A page that nobody sees asks for nothing: browsers have few connections, and so has the aggregator.
document.addEventListener("visibilitychange", () => (document.hidden ? hush() : listen()));

page.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-earlier]");
  if (!button) return;
  const answer = await fetch(`${path}/rounds?below=${button.dataset.earlier}`);
  if (answer.ok) {
    const row = button.closest("tr");
    row.insertAdjacentHTML("beforebegin", await answer.text());
    const next = row.previousElementSibling;
    row.remove();
    (next?.querySelector("button") ?? document.querySelector("#rounds a"))?.focus();
  }
});

drawSeries();
listen();
