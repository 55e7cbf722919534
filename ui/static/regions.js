// Regions drawn on the picture's frame. props.value is a list of regions (see ui/components/canvas.py), redrawn only when
// Python changes it; props.mode is 'drawn' or 'auto', props.frame [width, height], props.picture the address of the last
// picture, props.found the places of the last automatic regions. The adapters on offer come from the rack, in the page.
const root = element.querySelector('.as-canvas');
const LONGEST = 512;
const SMALLEST = 0.02;
const TONES = ['a', 'b', 'c', 'd', 'e', 'f'];
const HANDLES = ['nw', 'n', 'ne', 'e', 'se', 's', 'sw', 'w'];
let regions = [];
let offered = [];
let selected = -1;
let tool = 'box';
let brush = 12;
let showPicture = true;
const paints = new WeakMap();
const suggested = new WeakMap();

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ''));
  return node;
};
const clamp = (value, low, high) => Math.min(high, Math.max(low, Number.isFinite(value) ? value : low));
const penOf = (paint) => paint.getContext('2d', { willReadFrequently: true });
const round = (value) => Math.round(value * 1000) / 1000;
const percent = (value) => Math.round(value * 1000) / 10;
const MOST_STEPS = 60;
let past = [];  // what can be undone, the latest last; what publish() left last is 'present'
let future = [];
let present = '[]';
const publish = () => {
  props.value = regions.map((region) => ({ ...region }));
  const now = JSON.stringify(props.value);
  if (now === present) return;
  past = [...past.slice(-MOST_STEPS), present];
  future = [];
  present = now;
  drawUndo();
};
function step(from, to) {
  if (!from.length) return;
  to.push(present);
  present = from.pop();
  regions = JSON.parse(present);
  selected = Math.min(selected, regions.length - 1);
  props.value = regions.map((region) => ({ ...region }));
  draw();
}
const undo = () => step(past, future);
const redo = () => step(future, past);
const frame = () => { const [width, height] = props.frame || [1, 1]; return { width, height, ratio: width / height }; };
const toneOf = (region) => {
  const place = offered.findIndex((adapter) => region.adapters.includes(adapter.name));
  return place < 0 ? 'none' : TONES[place % TONES.length];
};
const titleOf = (region, index) => region.name || region.adapters.join(' + ') || `Region ${index + 1}`;
const triggersOf = (region) => offered.filter((adapter) => region.adapters.includes(adapter.name)).flatMap((adapter) => adapter.triggers || []);
const labelOf = (region, index) => `${index + 1} ${region.name || region.adapters.join(' + ') || 'no adapter'}`;
const blank = () => ({ name: '', box: null, mask: '', adapters: [], prompt: '', negative: null, scale: 1, schedule: [], words: [] });

// ------------------------------------------------------------------------------------------------ regions

function addRegion(region) {
  const free = offered.find((adapter) => !regions.some((other) => other.adapters.includes(adapter.name)));
  if (!region.adapters.length && free) region.adapters = [free.name];
  suggest(region);
  regions.push(region);
  selected = regions.length - 1;
  return region;
}

// The prompt of the picture, which applies to regions without a prompt of their own.
const sentence = () => document.querySelector('#prompt textarea')?.value.trim() || 'as for the whole picture';
document.addEventListener('input', (event) => {
  if (event.target.closest('#prompt')) root.querySelectorAll('[data-field=prompt]').forEach((field) => { field.placeholder = sentence(); });
});

// The trigger words of its adapters, unless the user wrote something else. Columns side by side use the picture's prompt.
function suggest(region) {
  if (region.prompt && region.prompt !== suggested.get(region)) return;
  region.prompt = triggersOf(region).join(' and ');
  suggested.set(region, region.prompt);
}

function removeRegion(index) {
  regions.splice(index, 1);
  selected = Math.min(selected, regions.length - 1);
  publish();
  draw();
}

function sideBySide() {
  const names = offered.length ? offered.map((adapter) => adapter.name) : [null, null];
  names.forEach((name, k) => regions.push({
    ...blank(), adapters: name ? [name] : [], box: [round(k / names.length), 0, round((k + 1) / names.length), 1],
  }));
  selected = 0;
  publish();
  draw();
  trigger('side_by_side', { count: names.length });
}

function select(index) {
  selected = index;
  root.querySelectorAll('.as-region, .as-region-card').forEach((node) => node.classList.toggle('selected', Number(node.dataset.index) === index));
}

// ------------------------------------------------------------------------------------------------ paint

function paintSize() {
  const { ratio } = frame();
  return ratio >= 1 ? [LONGEST, Math.max(1, Math.round(LONGEST / ratio))] : [Math.max(1, Math.round(LONGEST * ratio)), LONGEST];
}

// The canvas of a painted region: white where painted, transparent elsewhere.
function paintOf(region) {
  if (!paints.has(region)) {
    const [width, height] = paintSize();
    const paint = make('canvas', { width, height });
    paints.set(region, paint);
    if (region.mask) loadMask(region, paint);
  }
  return paints.get(region);
}

async function loadMask(region, paint) {
  const ratio = await paintFrom(region.mask, paint);
  if (ratio === 0) return;
  if (Math.abs(ratio / frame().ratio - 1) > 0.02) keepPaint(region);
  drawPlaces();
  drawNumbers();
}

// What is bright in a picture becomes paint; returns the picture's shape, 0 when it cannot be read.
async function paintFrom(source, paint) {
  const image = new Image();
  image.src = source;
  try { await image.decode(); } catch { return 0; }
  const pen = penOf(paint);
  pen.drawImage(image, 0, 0, paint.width, paint.height);
  const pixels = pen.getImageData(0, 0, paint.width, paint.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data[i + 3] = pixels.data[i];
    pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = 255;
  }
  pen.putImageData(pixels, 0, 0);
  return image.naturalWidth / image.naturalHeight;
}

// A region's paint as a PNG, white on black; empty when nothing is painted.
function keepPaint(region) {
  const paint = paintOf(region);
  const sheet = make('canvas', { width: paint.width, height: paint.height });
  const pen = sheet.getContext('2d');
  pen.fillRect(0, 0, sheet.width, sheet.height);
  pen.drawImage(paint, 0, 0);
  region.mask = coverage(paint) > 0 ? sheet.toDataURL('image/png') : '';
  publish();
}

function coverage(paint) {
  const { data } = penOf(paint).getImageData(0, 0, paint.width, paint.height);
  let sum = 0;
  for (let i = 3; i < data.length; i += 4) sum += data[i];
  return sum / (255 * paint.width * paint.height);
}

function bounds(paint) {
  const { data } = penOf(paint).getImageData(0, 0, paint.width, paint.height);
  let [left, top, right, bottom] = [paint.width, paint.height, 0, 0];
  for (let y = 0; y < paint.height; y += 1) {
    for (let x = 0; x < paint.width; x += 1) {
      if (data[4 * (y * paint.width + x) + 3] > 127) {
        left = Math.min(left, x); right = Math.max(right, x + 1); top = Math.min(top, y); bottom = Math.max(bottom, y + 1);
      }
    }
  }
  return right > left ? [left / paint.width, top / paint.height, right / paint.width, bottom / paint.height].map(round) : null;
}

// When the picture's shape changes, paint is stretched with it, as boxes are.
function refit() {
  const [width, height] = paintSize();
  for (const region of regions) {
    const old = paints.get(region);
    if (!old || (old.width === width && old.height === height)) continue;
    const paint = make('canvas', { width, height });
    penOf(paint).drawImage(old, 0, 0, width, height);
    paints.set(region, paint);
    if (region.mask) keepPaint(region);
  }
}

function stroke(region, from, to) {
  const paint = paintOf(region);
  const pen = penOf(paint);
  pen.globalCompositeOperation = tool === 'erase' ? 'destination-out' : 'source-over';
  pen.strokeStyle = 'white';
  pen.lineCap = pen.lineJoin = 'round';
  pen.lineWidth = (brush / 100) * Math.max(paint.width, paint.height);
  pen.beginPath();
  pen.moveTo(from.x * paint.width, from.y * paint.height);
  pen.lineTo(to.x * paint.width, to.y * paint.height + 0.01);
  pen.stroke();
  pen.globalCompositeOperation = 'source-over';
}

// ------------------------------------------------------------------------------------------------ the frame

const stage = make('div', { class: 'as-stage', id: 'regions-stage' });
const backdrop = make('img', { class: 'as-stage-picture', alt: 'The last picture', draggable: 'false' });
const layers = make('div', { class: 'as-stage-layers' });
const hint = make('p', { class: 'as-stage-hint' });
const dot = make('i', { class: 'as-stage-brush' });
stage.append(backdrop, layers, hint, dot);
backdrop.addEventListener('load', () => backdrop.classList.toggle('tiny', backdrop.naturalWidth <= 128));

function at(event) {
  const sheet = stage.getBoundingClientRect();
  return { x: clamp((event.clientX - sheet.left) / sheet.width, 0, 1), y: clamp((event.clientY - sheet.top) / sheet.height, 0, 1) };
}

function tinted(paint, tone) {
  const sheet = make('canvas', { width: paint.width, height: paint.height, class: 'as-paint' });
  const pen = sheet.getContext('2d');
  pen.drawImage(paint, 0, 0);
  pen.globalCompositeOperation = 'source-in';
  pen.fillStyle = getComputedStyle(root).getPropertyValue(`--as-${tone}`) || '#6b6b7b';
  pen.fillRect(0, 0, sheet.width, sheet.height);
  return sheet;
}

function place(node, [x0, y0, x1, y1]) {
  Object.assign(node.style, { left: `${x0 * 100}%`, top: `${y0 * 100}%`, width: `${(x1 - x0) * 100}%`, height: `${(y1 - y0) * 100}%` });
}

function drawBox(region, index) {
  const words = region.box.map(percent);
  const node = make('div', {
    class: `as-region tone-${toneOf(region)}${index === selected ? ' selected' : ''}`, 'data-index': index, tabindex: '0', role: 'group',
    'aria-label': `${titleOf(region, index)}: left ${words[0]}, top ${words[1]}, right ${words[2]}, bottom ${words[3]} percent. `
      + 'Arrow keys move it, with Shift they change its size, Delete removes it.',
    onkeydown: (event) => keys(event, index), onfocus: () => select(index),
  }, make('b', {}, labelOf(region, index)), ...HANDLES.map((side) => make('i', { class: `handle ${side}`, 'data-side': side })));
  place(node, region.box);
  return node;
}

function drawPaint(region, index) {
  const paint = paintOf(region);
  const tone = toneOf(region);
  const label = make('button', {
    type: 'button', class: 'as-paint-label', onclick: () => select(index), 'aria-label': `Choose ${titleOf(region, index)}`,
  }, labelOf(region, index));
  centre(label, bounds(paint));
  layers.append(make('div', { class: `as-region painted tone-${tone}${index === selected ? ' selected' : ''}`, 'data-index': index },
    tinted(paint, tone), label));
}

function drawPlaces() {
  layers.replaceChildren();
  if (props.mode === 'auto') {
    (props.found || []).forEach(drawFound);
  } else {
    regions.forEach((region, index) => {
      if (region.box) layers.append(drawBox(region, index));
      else drawPaint(region, index);
    });
  }
  const { width, height, ratio } = frame();
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.maxWidth = `calc(min(440px, 62vh) * ${Math.max(0.3, ratio)})`;
  backdrop.hidden = !(props.picture && showPicture);
  if (props.picture && backdrop.getAttribute('src') !== props.picture) backdrop.src = props.picture;
  hint.hidden = props.mode === 'auto' ? (props.found || []).length > 0 : regions.length > 0;
  hint.textContent = props.mode === 'auto'
    ? 'The first steps find the place of each subject. After a run the places are shown here.'
    : 'Draw a box with the mouse or a finger, or choose the brush and paint.';
  stage.dataset.tool = props.mode === 'auto' ? 'none' : tool;
}

async function drawFound(item, index) {
  const tone = TONES[index % TONES.length];
  const node = make('div', { class: `as-region painted tone-${tone}` });
  layers.append(node);
  const [width, height] = paintSize();
  const paint = make('canvas', { width, height });
  if (await paintFrom(item.mask, paint) === 0) return;
  item.paint = paint;
  const label = make('span', { class: 'as-paint-label' }, item.name);
  centre(label, bounds(paint));
  node.replaceChildren(tinted(paint, tone), label);
}

function centre(label, area) {
  if (area) Object.assign(label.style, { left: `${(area[0] + area[2]) * 50}%`, top: `${(area[1] + area[3]) * 50}%` });
  label.hidden = !area;
}

function keepFound() {
  regions = (props.found || []).filter((item) => item.paint).map((item) => {
    const names = offered.map((adapter) => adapter.name).filter((name) => item.name.split('+').includes(name));
    const region = { ...blank(), name: names.join('+') === item.name ? '' : item.name, adapters: names };
    paints.set(region, item.paint);
    return region;
  });
  regions.forEach(keepPaint);
  selected = 0;
  props.mode = 'drawn';
  publish();
  draw();
  trigger('edit_found', {});
}

// ------------------------------------------------------------------------------------------------ drawing with a pointer

stage.addEventListener('pointerdown', (event) => {
  if (props.mode === 'auto' || event.button > 0 || event.target.closest('.as-paint-label')) return;
  event.preventDefault();
  stage.setPointerCapture(event.pointerId);
  if (tool === 'box') boxDrag(event);
  else brushDrag(event);
});

function follow(event, move, end) {
  const moved = (next) => { if (next.pointerId === event.pointerId) move(at(next), next); };
  const ended = (next) => {
    if (next.pointerId !== event.pointerId) return;
    stage.removeEventListener('pointermove', moved);
    stage.removeEventListener('pointerup', ended);
    stage.removeEventListener('pointercancel', ended);
    end();
  };
  stage.addEventListener('pointermove', moved);
  stage.addEventListener('pointerup', ended);
  stage.addEventListener('pointercancel', ended);
}

function boxDrag(event) {
  const start = at(event);
  const target = event.shiftKey ? null : event.target.closest('.as-region:not(.painted)');
  if (target) {
    const index = Number(target.dataset.index);
    const side = event.target.dataset.side || '';
    const before = [...regions[index].box];
    select(index);
    target.focus({ preventScroll: true });
    follow(event, (now) => change(index, side ? resized(before, side, now) : moved(before, now.x - start.x, now.y - start.y)), publish);
    return;
  }
  const region = { ...blank(), box: [start.x, start.y, start.x, start.y] };
  let index = -1;
  follow(event, (now) => {
    const box = [Math.min(start.x, now.x), Math.min(start.y, now.y), Math.max(start.x, now.x), Math.max(start.y, now.y)].map(round);
    if (box[2] - box[0] < SMALLEST || box[3] - box[1] < SMALLEST) return;
    region.box = box;
    if (index < 0) { addRegion(region); index = selected; draw(); } else change(index, box);
  }, () => { if (index >= 0) publish(); else select(-1); });
}

function moved([x0, y0, x1, y1], dx, dy) {
  const x = clamp(x0 + dx, 0, 1 - (x1 - x0));
  const y = clamp(y0 + dy, 0, 1 - (y1 - y0));
  return [x, y, x + (x1 - x0), y + (y1 - y0)].map(round);
}

function resized([x0, y0, x1, y1], side, { x, y }) {
  return [
    side.includes('w') ? clamp(x, 0, x1 - SMALLEST) : x0, side.includes('n') ? clamp(y, 0, y1 - SMALLEST) : y0,
    side.includes('e') ? clamp(x, x0 + SMALLEST, 1) : x1, side.includes('s') ? clamp(y, y0 + SMALLEST, 1) : y1,
  ].map(round);
}

// Move a box by changing only its own elements, so that pointers and focus stay where they are.
function change(index, box) {
  regions[index].box = box;
  const node = layers.querySelector(`[data-index="${index}"]`);
  if (node) place(node, box);
  root.querySelectorAll(`[data-number^="${index}:"]`).forEach((field) => {
    if (field !== document.activeElement) field.value = percent(box[Number(field.dataset.number.split(':')[1])]);
  });
}

function keys(event, index) {
  const step = { ArrowLeft: [-0.01, 0], ArrowRight: [0.01, 0], ArrowUp: [0, -0.01], ArrowDown: [0, 0.01] }[event.key];
  if (event.key === 'Delete' || event.key === 'Backspace') {
    event.preventDefault();
    removeRegion(index);
  } else if (step) {
    event.preventDefault();
    const [x0, y0, x1, y1] = regions[index].box;
    change(index, event.shiftKey
      ? [x0, y0, clamp(x1 + step[0], x0 + SMALLEST, 1), clamp(y1 + step[1], y0 + SMALLEST, 1)].map(round)
      : moved([x0, y0, x1, y1], ...step));
    publish();
  }
}

function brushDrag(event) {
  const fits = regions[selected] && !regions[selected].box;
  if (tool === 'erase' && !fits) return;
  if (!fits) { addRegion(blank()); draw(); }
  const index = selected;
  const region = regions[index];
  let last = at(event);
  const touch = (now) => {
    stroke(region, last, now);
    last = now;
    const node = layers.querySelector(`[data-index="${index}"]`);
    node.querySelector('canvas').replaceWith(tinted(paintOf(region), toneOf(region)));
  };
  touch(last);
  follow(event, touch, () => { keepPaint(region); draw(); });
}

stage.addEventListener('pointermove', (event) => {
  const { x, y } = at(event);
  const side = (brush / 100) * Math.max(stage.clientWidth, stage.clientHeight);
  Object.assign(dot.style, { left: `${x * 100}%`, top: `${y * 100}%`, width: `${side}px`, height: `${side}px` });
});

// ------------------------------------------------------------------------------------------------ around the frame

const tools = make('div', { class: 'as-tools', role: 'toolbar', 'aria-label': 'Drawing tools' });
const cards = make('ol', { class: 'as-region-cards', 'aria-label': 'Regions' });
const numbers = make('details', { class: 'as-numbers' });
root.replaceChildren(tools, stage, cards, numbers);

function drawTools() {
  const button = (name, text, title) => make('button', {
    type: 'button', 'aria-pressed': String(tool === name), title, 'data-tool': name, onclick: () => { tool = name; drawTools(); drawPlaces(); },
  }, text);
  const size = make('input', { type: 'range', min: '2', max: '40', step: '1', value: brush, 'aria-label': 'Size of the brush, percent' });
  size.addEventListener('input', () => { brush = Number(size.value); });
  const look = make('input', { type: 'checkbox', id: 'regions-look' });
  look.checked = showPicture;
  look.addEventListener('change', () => { showPicture = look.checked; drawPlaces(); });
  const behind = props.picture ? make('label', { class: 'as-tools-look' }, look, 'Picture') : '';
  if (props.mode === 'auto') {
    const keep = (props.found || []).length
      ? make('button', { type: 'button', class: 'as-quiet', id: 'keep-found', onclick: keepFound }, 'Edit these places') : '';
    tools.replaceChildren(...[keep, behind].filter(Boolean));
    return;
  }
  const kinds = make('span', { class: 'as-tools-kinds' }, button('box', 'Box', 'Drag on the frame to draw a box; hold Shift inside another'),
    button('brush', 'Brush', 'Paint the chosen region'), button('erase', 'Eraser', 'Erase paint from the chosen region'));
  const clear = regions.length ? make('button', { type: 'button', class: 'as-quiet', onclick: () => {
    regions = []; selected = -1; publish(); draw();
  } }, 'Clear') : make('button', { type: 'button', class: 'as-quiet', id: 'side-by-side', onclick: sideBySide }, 'Side by side');
  const back = make('span', { class: 'as-tools-kinds' },
    make('button', { type: 'button', id: 'regions-undo', title: 'Undo (Ctrl + Z)', 'aria-label': 'Undo', onclick: undo }, '↶'),
    make('button', { type: 'button', id: 'regions-redo', title: 'Redo (Ctrl + Shift + Z)', 'aria-label': 'Redo', onclick: redo }, '↷'));
  tools.replaceChildren(...[kinds, tool === 'box' ? '' : size, back, clear, behind].filter(Boolean));
  drawUndo();
}

function drawUndo() {
  for (const [id, steps] of [['regions-undo', past], ['regions-redo', future]]) {
    const button = root.querySelector(`#${id}`);
    if (button) button.disabled = !steps.length;
  }
}

root.addEventListener('keydown', (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.target.matches('input, textarea')) return;
  const key = event.key.toLowerCase();
  if (key !== 'z' && key !== 'y') return;
  event.preventDefault();
  if (key === 'y' || event.shiftKey) redo(); else undo();
});

function drawCard(region, index) {
  const line = (label, field) => make('label', { class: 'as-region-line' }, make('span', {}, label), field);
  const text = (key, label, placeholder, from = (value) => value, to = (value) => value) => {
    const field = make('input', { type: 'text', placeholder, 'aria-label': `${label} of region ${index + 1}`, 'data-field': key });
    field.value = from(region[key]) || '';
    field.addEventListener('input', () => {
      region[key] = to(field.value);
      publish();
      if (key === 'name') layers.querySelector(`[data-index="${index}"] :is(b, button)`).textContent = labelOf(region, index);
    });
    return field;
  };
  const scale = make('input', { type: 'number', step: '0.05', value: region.scale, 'aria-label': `Strength of region ${index + 1}`, 'data-field': 'scale' });
  scale.addEventListener('input', () => { const value = parseFloat(scale.value); if (Number.isFinite(value)) { region.scale = value; publish(); } });
  const toggle = (name, known) => make('button', {
    type: 'button', class: `as-chip tone-${known < 0 ? 'none' : TONES[known % TONES.length]}${known < 0 ? ' missing' : ''}`, 'data-adapter': name,
    'aria-pressed': String(region.adapters.includes(name)), title: known < 0 ? 'Not among the adapters above' : '',
    onclick: () => {
      region.adapters = region.adapters.includes(name) ? region.adapters.filter((other) => other !== name) : [...region.adapters, name];
      suggest(region);
      selected = index;
      publish();
      draw();
    },
  }, known < 0 ? `${name}, not here` : name);
  const chips = offered.map((adapter, known) => toggle(adapter.name, known));
  const lost = region.adapters.filter((name) => !offered.some((adapter) => adapter.name === name)).map((name) => toggle(name, -1));
  const none = chips.length + lost.length ? '' : make('span', { class: 'as-rack-none' }, 'Choose adapters above, then attach them here.');
  const words = triggersOf(region);
  const remove = make('button', { type: 'button', class: 'as-icon', 'aria-label': `Remove region ${index + 1}`, onclick: () => removeRegion(index) }, '×');
  const schedule = region.schedule.length ? make('p', { class: 'as-rack-custom' }, `own schedule, ${region.schedule.length} keyframes `,
    make('button', { type: 'button', class: 'as-link', onclick: () => { region.schedule = []; publish(); draw(); } }, 'use always')) : '';
  const more = make('details', { class: 'as-fold' }, make('summary', {}, 'More'),
    line('Avoid', text('negative', 'Negative prompt', 'as for the whole picture', (value) => value, (value) => value || null)),
    line('Subject', text('words', 'Subject words', words.join(', ') || 'words of its prompt that name it',
      (value) => value.join(', '), (value) => value.split(',').map((word) => word.trim()).filter(Boolean))),
    line('Name', text('name', 'Name', region.adapters.join(' + ') || `Region ${index + 1}`)), schedule);
  if (region.negative || region.words.length || region.name || region.schedule.length) more.open = true;
  const tone = toneOf(region);
  return make('li', { class: `as-region-card tone-${tone}${index === selected ? ' selected' : ''}`, 'data-index': index, onfocusin: () => select(index) },
    make('div', { class: 'as-region-head' }, make('span', { class: 'as-region-number' }, String(index + 1)),
      make('div', { class: 'as-rack-chips' }, ...chips, ...lost, none), remove),
    line('Prompt', text('prompt', 'Prompt', sentence())),
    line('Strength', scale), more);
}

function drawNumbers() {
  const rows = regions.map((region, index) => {
    const head = make('th', { scope: 'row' }, labelOf(region, index));
    if (!region.box) {
      const area = bounds(paintOf(region));
      const swap = area ? make('button', { type: 'button', class: 'as-link', onclick: () => {
        region.box = area; region.mask = ''; paints.delete(region); publish(); draw();
      } }, 'make it a box') : '';
      return make('tr', {}, head, make('td', { colspan: '4' }, area ? `painted, ${percent(coverage(paintOf(region)))} % of the picture ` : 'nothing painted yet ', swap));
    }
    return make('tr', {}, head, ...['left', 'top', 'right', 'bottom'].map((edge, k) => {
      const field = make('input', {
        type: 'number', min: '0', max: '100', step: '1', value: percent(region.box[k]), 'data-number': `${index}:${k}`,
        'aria-label': `${edge} edge of region ${index + 1}, percent`,
      });
      field.addEventListener('change', () => {
        const box = [...region.box];
        const value = round(parseFloat(field.value) / 100);
        if (Number.isFinite(value)) box[k] = k < 2 ? clamp(value, 0, box[k + 2] - SMALLEST) : clamp(value, box[k - 2] + SMALLEST, 1);
        change(index, box.map(round));
        field.value = percent(regions[index].box[k]);
        publish();
      });
      return make('td', {}, field);
    }));
  });
  const add = make('button', { type: 'button', class: 'as-link', id: 'add-region', onclick: () => {
    addRegion({ ...blank(), box: [0.25, 0.25, 0.75, 0.75] }); publish(); draw();
  } }, 'Add a region');
  const table = rows.length ? make('table', {}, make('thead', {}, make('tr', {}, ...['Region', 'Left', 'Top', 'Right', 'Bottom'].map((word) => make('th', { scope: 'col' }, word)))),
    make('tbody', {}, ...rows)) : '';
  numbers.replaceChildren(...[make('summary', {}, 'Places as numbers (percent of the picture)'), table, add].filter(Boolean));
}

function draw() {
  const auto = props.mode === 'auto';
  cards.hidden = numbers.hidden = auto;
  if (!auto) {
    const unfolded = new Set([...cards.querySelectorAll('.as-region-card:has(details[open])')].map((card) => Number(card.dataset.index)));
    cards.replaceChildren(...regions.map(drawCard));
    unfolded.forEach((index) => cards.children[index]?.querySelector('details').setAttribute('open', ''));
  }
  drawTools();
  drawPlaces();
  if (!auto) drawNumbers();
}

function take() {
  regions = (props.value || []).map((region) => ({ ...blank(), ...region }));
  const now = JSON.stringify(regions);
  if (now !== present) { past = [...past.slice(-MOST_STEPS), present]; future = []; present = now; }
  selected = Math.min(selected, regions.length - 1);
  draw();
}

document.addEventListener('as-rack', (event) => { offered = event.detail; draw(); });
watch('value', take);
watch(['mode', 'picture', 'found'], draw);
watch('frame', () => { refit(); draw(); });
take();
document.dispatchEvent(new CustomEvent('as-rack-wanted'));
