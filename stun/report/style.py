"""Style sheet of a page, for light and dark screens of any width."""

from stun.report.theme import EITHER_KEPT

STYLE = """
:root { --paper:#fcfbf8; --ink:#23262a; --faint:#62676c; --line:#e2dfd8; --kept:#12795a; --removed:#b4471f; --tint:#f3f1ec;
  --shade:#23262a33; --map:MAP }
@media (prefers-color-scheme: dark) {
  :root { --paper:#15171a; --ink:#e4e2dc; --faint:#9a9fa5; --line:#2d3136; --kept:#4fbf97; --removed:#ee8a68; --tint:#1d2024;
    --shade:#e4e2dc33 }
}
* { box-sizing:border-box }
html { color-scheme:light dark; -webkit-text-size-adjust:100% }
body { margin:0; overflow-wrap:break-word; background:var(--paper); color:var(--ink);
  font:16px/1.5 Charter,"Bitstream Charter","Sitka Text",Cambria,serif }
main { max-width:73rem; margin:0 auto; padding:2.5rem 1.25rem 4rem }
h1 { font-size:clamp(1.7rem,5vw,2.5rem); line-height:1.15; font-weight:600; letter-spacing:-.01em; margin:0 }
h2 { font-size:1.15rem; font-weight:600; margin:0 0 .15rem }
p { margin:0 0 .8rem; max-width:42rem }
a { color:var(--kept) }
.eyebrow, dt, th, figcaption, footer, .none, .scale, .bar, .experts {
  font-family:ui-sans-serif,system-ui,"Segoe UI",Roboto,sans-serif }
.eyebrow { color:var(--faint); font-size:.8rem; margin:0 0 .5rem }
.aid { color:var(--faint); font-size:.95rem }
.verdict { font-size:1.2rem; line-height:1.4; margin:.8rem 0 1rem }
dl.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(9rem,1fr)); gap:1.4rem 2rem; margin:2rem 0 0;
  padding:1.4rem 0 0; border-top:2px solid var(--ink) }
.facts div { min-width:0 }
dt { color:var(--faint); font-size:.8rem }
dd { margin:0; font-size:1.75rem; line-height:1.2; font-variant-numeric:lining-nums tabular-nums }
dd { white-space:nowrap } dd small { display:block; white-space:normal; color:var(--faint); font-size:.85rem; line-height:1.4 }
.sections { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:0 3rem }
section { border-top:1px solid var(--line); padding:1.3rem 0 2rem; margin-top:1rem; min-width:0 }
section.wide { grid-column:1/-1 }
img { display:block; max-width:100%; height:auto }
figure { margin:0 }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(6.6rem,1fr)); gap:1.2rem .7rem }
.few { grid-template-columns:repeat(auto-fill,minmax(min(13rem,45%),1fr)); gap:1.6rem 2rem }
.tiles img, .tiles svg { display:block; width:100%; overflow:visible }
.tiles svg { height:2.5rem } .tiles svg.bars { height:5rem } .tiles.few svg { height:4rem } .tiles.few svg.bars { height:8rem }
.map { aspect-ratio:1 } .few .map, figure:target .map { image-rendering:pixelated }
.tiles path { fill:none; stroke:var(--faint); stroke-width:.5; vector-effect:non-scaling-stroke }
.tiles.few path, figure:target path { stroke-width:1 }
.tiles path.merged { stroke:var(--kept) } .tiles path.cut { stroke:var(--removed); stroke-dasharray:4 3 }
.tiles .bars path { stroke:none; fill:var(--kept) } .tiles .bars path.removed { fill:var(--removed) }
a.open { display:block; color:inherit; cursor:zoom-in } .bar, .scale, .details { display:none }
figure:target { position:fixed; inset:0; z-index:1; overflow:auto; background:var(--paper); padding:1rem 1.25rem 2rem;
  display:grid;
  grid-template:"bar bar" auto "caption drawing" auto "scale drawing" auto "details drawing" 1fr / minmax(16rem,1fr) auto;
  gap:0 2rem; align-items:start }
figure:target .bar { grid-area:bar; display:flex; gap:1.5rem; position:sticky; left:0; max-width:none; margin:0 0 .8rem }
figure:target .bar a:last-child { margin-left:auto }
figure:target figcaption { grid-area:caption; color:var(--ink); font-size:1.15rem; padding:0 }
figure:target .scale { grid-area:scale; display:block } figure:target .details { grid-area:details; display:block }
figure:target .open { grid-area:drawing; width:max(70vh,var(--least)); cursor:default } figure:target .tree { height:17vh }
.tiles figure:target svg.bars { height:50vh; margin-bottom:.8rem }
.scale i { display:inline-block; width:8rem; height:.8rem; margin:0 .6rem; border:1px solid var(--line);
  background:linear-gradient(to right,var(--map),transparent); vertical-align:-.1rem }
.experts { font-variant-numeric:lining-nums tabular-nums; line-height:1.7 } .experts b { color:var(--kept) }
figcaption { color:var(--faint); font-size:.78rem; padding-top:.35rem; font-variant-numeric:tabular-nums }
.scroll { overflow-x:auto; background:linear-gradient(to left,var(--paper) 40%,transparent) right/2.5rem 100% no-repeat local,
  linear-gradient(to left,var(--shade),transparent) right/.9rem 100% no-repeat scroll }
table { border-collapse:collapse; font-size:.95rem; font-variant-numeric:lining-nums tabular-nums }
th { font-size:.78rem; font-weight:500; color:var(--faint); text-align:right; vertical-align:bottom }
td, th { padding:.35rem .9rem .35rem 0; border-bottom:1px solid var(--line); white-space:nowrap }
td { text-align:right }
td:first-child, th:first-child, .words td { text-align:left }
.numbers td:first-child, .runs td:first-child, .words td { white-space:normal }
.runs td:first-child, .runs th:first-child { position:sticky; left:0; min-width:8rem; max-width:45vw; background:var(--paper) }
.words td { overflow-wrap:anywhere } .words td:first-child { vertical-align:top; color:var(--faint);
  overflow-wrap:normal; min-width:9.5rem }
.pair { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:1rem 3rem; align-items:start }
code { font:.85em/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace }
pre { background:var(--tint); padding:.8rem 1rem; border-radius:4px; white-space:pre-wrap; overflow-wrap:normal;
  overflow-x:auto; margin:.3rem 0 1rem }
.none { color:var(--faint); font-size:.9rem }
@media (max-width:56rem) {
  .sections, .pair { grid-template-columns:minmax(0,1fr) } main { padding-top:1.5rem }
  figure:target { grid-template:"bar" auto "caption" auto "scale" auto "drawing" auto "details" 1fr / minmax(0,1fr) }
  figure:target .open { width:max(100%,var(--least)) }
  figure:target > * { position:sticky; left:0 } figure:target .open { position:static }
}
footer { border-top:1px solid var(--line); margin-top:2rem; padding-top:1rem; color:var(--faint); font-size:.8rem }
""".replace("MAP", EITHER_KEPT)
