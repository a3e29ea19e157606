"""Holds the style sheet of the report. It refers to nothing outside the page: system fonts, no images."""

STYLE = """
:root{--paper:#fbfaf7;--card:#ffffff;--ink:#1d2321;--soft:#5f6a66;--line:#e4e2da;--loss:#b4552d;--heldout:#1f6f5c;
--speed:#2c5f96;--memory:#7a4b94;--gradient:#8a6d1f;--rate:#54616b;--before:#8a8f8c;--tint:#e9f2ee;--warn:#8f3d16;
--warn-tint:#fbeee6;--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Helvetica Neue",Arial,
sans-serif;--serif:ui-serif,"Iowan Old Style",Charter,"Palatino Linotype",Georgia,"Noto Serif","DejaVu Serif",serif;
--mono:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#141715;--card:#1c201e;--ink:#e8e9e4;--soft:#9ca6a1;--line:#303632;
--loss:#e58a5f;--heldout:#5cc2a4;--speed:#7db0e6;--memory:#c095dc;--gradient:#d3b457;--rate:#a3b1bb;--before:#8b938f;
--tint:#1d2f29;--warn:#f0a37c;--warn-tint:#3a251a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:3.5rem 1.5rem 2rem;max-width:70rem;background:var(--paper);color:var(--ink);
font:16px/1.55 var(--sans);font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
h1,h2,h3{font-family:var(--serif);font-weight:600;text-wrap:balance;margin:0}
h1{font-size:clamp(2rem,5vw,3.1rem);line-height:1.1;letter-spacing:-.015em;max-width:22ch}
h2{font-size:1.6rem;line-height:1.2;margin-bottom:.4rem}
h3{font-size:1.1rem;line-height:1.35}
h4{margin:0 0 .4rem;font-size:.75rem;letter-spacing:.08em;text-transform:uppercase;color:var(--soft)}
.eyebrow{display:flex;flex-wrap:wrap;gap:.4rem .8rem;align-items:center;margin:0 0 1rem;color:var(--soft);
font-size:.85rem}
.eyebrow span:not(.badge){font-family:var(--mono)}
.badge{padding:.05rem .6rem;border-radius:1rem;background:var(--warn-tint);color:var(--warn)}
.about,.lead{color:var(--soft);max-width:62ch;margin:.9rem 0 0}
.about{font-size:1.1rem}
.lead{margin:0 0 1rem}
section{margin-top:3.2rem}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:2.2rem 0 0;overflow:hidden;background:var(--line);
border:1px solid var(--line);border-radius:12px}
.tiles div{flex:1 1 9rem;background:var(--card);padding:1rem 1.1rem .9rem}
.tiles .score{flex-basis:14rem;background:var(--tint)}
.tiles dt{font-size:.8rem;color:var(--soft)}
.tiles dd{margin:.15rem 0 0;font-size:1.5rem;font-weight:600;line-height:1.25;letter-spacing:-.01em;white-space:nowrap}
.tiles dd.note{font-size:.8rem;font-weight:400;letter-spacing:0;color:var(--soft);white-space:normal}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem;margin-top:1rem}
figure{margin:0;padding:1rem .6rem .3rem 1.1rem;background:var(--card);border:1px solid var(--line);border-radius:12px;
min-width:0}
figcaption{font-size:.85rem;color:var(--soft);margin-bottom:.5rem}
figcaption b{display:block;font-size:1rem;color:var(--ink)}
svg{display:block;width:100%;height:auto;overflow:visible;font-family:var(--sans)}
.loss{--hue:var(--loss)}.heldout{--hue:var(--heldout)}.speed{--hue:var(--speed)}.memory{--hue:var(--memory)}
.gradient{--hue:var(--gradient)}.rate{--hue:var(--rate)}
svg path{fill:none;stroke-linejoin:round;stroke-linecap:round}
svg .grid{stroke:var(--line);stroke-width:1}
svg .line,svg .dots{stroke:var(--hue);stroke-width:2.2}
svg .faint{stroke:var(--hue);stroke-width:1;opacity:.32}
svg .dot{fill:var(--hue)}
svg .ring{fill:var(--card);fill-opacity:.01;stroke:var(--hue);stroke-width:2}
svg .cross{stroke:var(--warn);stroke-width:2}
svg .tick{fill:var(--soft);font-size:12px}
svg .end{fill:var(--hue);font-size:13px;font-weight:600}
article{margin-top:1rem;padding:1.1rem 1.2rem;background:var(--card);border:1px solid var(--line);border-radius:12px}
article h3{overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:.9rem;margin-top:.8rem}
.pair>div{min-width:0;padding:.8rem 1rem;border-radius:8px;background:var(--paper);border-left:3px solid var(--before)}
.pair>.after{background:var(--tint);border-left-color:var(--heldout)}
.written{margin:0;font-family:var(--serif);font-size:.98rem;line-height:1.6;white-space:pre-wrap;overflow-wrap:anywhere}
.prompt,.none{color:var(--soft)}
.none{margin:0;font-style:italic}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 2.5rem;align-items:start}
.facts h2{grid-column:1/-1}
table{width:100%;border-collapse:collapse;font-size:.92rem}
caption{text-align:left;padding:.4rem 0;color:var(--soft);font-size:.85rem}
th,td{padding:.45rem .8rem .45rem 0;border-top:1px solid var(--line);text-align:left;vertical-align:top;
overflow-wrap:anywhere}
tbody th{font-weight:400;color:var(--soft)}
thead th{font-weight:600;font-size:.82rem}
thead th,thead td{border-top:0}
td.number{text-align:right;white-space:nowrap}
thead th{text-align:right;white-space:nowrap}
.kept td{background:var(--tint);font-weight:600}
.plan th{width:16rem}
code{font-family:var(--mono);font-size:.9em}
.names{columns:18rem;gap:2rem;margin:0;padding-left:1.1rem;font-size:.92rem}
.names li{overflow-wrap:anywhere;break-inside:avoid}
summary{cursor:pointer;color:var(--soft);padding:.3rem 0}
summary:focus-visible{outline:2px solid var(--heldout);outline-offset:3px}
footer{margin-top:4rem;padding-top:1rem;border-top:1px solid var(--line);color:var(--soft);font-size:.85rem;
max-width:75ch}
@media print{body{padding:0}figure,article,.tiles{break-inside:avoid}}
"""
