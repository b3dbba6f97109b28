"""The page of a rank, `GET /`: one file, which shows its `/status` and asks again each second.

What it shows comes from peers as well, so it is put in as text only, and the headers let the page
load nothing and talk to nobody but this rank.
"""

PAGE_HEADERS = (
    "Content-Security-Policy: default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Cache-Control: no-store",
)
PAGE = b"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>NetLoader</title>
<style>
:root { color-scheme: light dark; --line: #8885; --here: #2a7; }
body { font: 15px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto;
  padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 1.6rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } td.number, th.number { text-align: right }
code { font-size: .9em; overflow-wrap: anywhere }
.state { padding: .1rem .5rem; border-radius: .6rem; border: 1px solid var(--line) }
.serving { background: var(--here); color: #fff } .loading { background: #c80; color: #fff }
.map { display: grid; grid-template-columns: repeat(auto-fill, 11px); gap: 2px; margin: .6rem 0 }
.map i { height: 11px; background: #8884 } .map i b { display: block; height: 100% }
.map b { background: var(--here) }
#problem { color: #c33; font-weight: 600 }
</style>
</head>
<body>
<h1>NetLoader <span id="title"></span></h1>
<p id="problem" role="alert"></p>
<main id="main">The page needs JavaScript; <a href="/status">/status</a> does not.</main>
<script>
"use strict";
const INTERVAL = 1000;
let before = null;

function make(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function size(bytes) {
  for (const [unit, name] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (bytes >= unit) return (bytes / unit).toFixed(1) + " " + name;
  return bytes + " B";
}

// Bytes per second since the answer before; nothing where that did not have the same thing.
function rate(now, then, seconds) {
  return then === undefined || seconds <= 0 ? "" : size(Math.max(0, now - then) / seconds) + "/s";
}

function table(head, rows) {
  const made = make("table"), top = made.insertRow();
  head.forEach(([name, kind]) => top.append(make("th", name, kind)));
  for (const row of rows) {
    const line = made.insertRow();
    row.forEach((text, at) => line.append(make("td", text, head[at][1])));
  }
  return made;
}

function show(status, seconds) {
  const old = before ? before.status : { models: [], sessions: [] }, main = make("main");
  main.id = "main";
  document.getElementById("title").textContent =
    status.version + ", rank " + status.rank + ", " + location.host;
  document.title = "NetLoader rank " + status.rank + " " + status.models.map(m => m.state);
  status.models.forEach(model => {
    const name = model.identity.model + (model.identity.group === "netloader" ? "" : " (draft)");
    const last = old.models.find(m => m.identity.group === model.identity.group);
    const head = make("h2", name + " ");
    head.append(make("span", model.state, "state " + model.state));
    main.append(head);
    if (model.reason) main.append(make("p", model.reason));
    const facts = make("p");
    facts.append(size(model.nbytes) + ", weights digest ",
      make("code", model.weights || "not known"), ", epoch " + model.epoch);
    if (model.state === "serving") facts.append(", loaded from " + model.loaded_from);
    main.append(facts);
    if (model.blocks && model.blocks_here < model.blocks) {
      const here = model.blocks_here + " of " + model.blocks + " blocks are here";
      main.append(make("p", here));
      const map = make("div", undefined, "map");
      map.setAttribute("role", "img");
      map.setAttribute("aria-label", here);
      for (const digit of model.map) {
        const cell = make("i"), part = make("b");
        part.style.opacity = Number(digit) / 9;
        cell.append(part);
        map.append(cell);
      }
      main.append(map);
    }
    if (model.feeds.length) {
      main.append(make("h3", "Loads from"), table(
        [["Source"], ["Received", "number"], ["Rate", "number"]],
        model.feeds.map(feed => {
          const then = last && last.feeds.find(f => f.address === feed.address);
          return [feed.address, size(feed.bytes_received),
            rate(feed.bytes_received, then && then.bytes_received, seconds)];
        })));
    }
    const ranks = Object.entries(model.endpoints);
    if (ranks.length > 1) {
      main.append(make("h3", "Ranks of this instance"), table(
        [["Rank"], ["Address"], ["Weights digest"]],
        ranks.map(([rank, end]) => [rank, end.address, model.ranks[rank] || ""])));
    }
  });
  main.append(make("h2", "Sessions"));
  main.append(make("p", status.places_taken + " of " + status.places + " places are taken, " +
    size(status.bytes_sent) + " sent since the start"));
  if (status.sessions.length) {
    main.append(table(
      [["Client"], ["Passes on at"], ["Sent", "number"], ["Rate", "number"], ["Seconds", "number"]],
      status.sessions.map(one => {
        const then = old.sessions.find(s => s.peer === one.peer);
        return [one.peer, one.relay || "", size(one.bytes_sent),
          rate(one.bytes_sent, then && then.bytes_sent, seconds), one.seconds.toFixed(1)];
      })));
  }
  document.getElementById("main").replaceWith(main);
}

// Of the address without a password in it, with which nothing can be fetched.
async function refresh() {
  let problem = "";
  try {
    const answer = await fetch(location.origin + "/status",
      { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error("/status answers " + answer.status);
    const status = await answer.json(), now = performance.now();
    show(status, before ? (now - before.at) / 1000 : 0);
    before = { status, at: now };
  } catch (error) {
    problem = "No news from this rank: " + error.message;
  }
  document.getElementById("problem").textContent = problem;
  setTimeout(refresh, INTERVAL);
}
refresh();
</script>
</body>
</html>
"""
