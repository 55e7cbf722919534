// The start picture with its mask. props.value is null or {id, url, name, size, mask, ...} (see ui/components/start.py);
// the painted part is redrawn, without paint all of it.
const root = element.querySelector('.as-start');
const LONGEST = 1024;
let item = null;
let tool = 'none';
let brush = 12;
let paint = null;  // opaque where painted, in a colour that shows on any picture
const INK = [111, 103, 217];

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
};
const penOf = (sheet) => sheet.getContext('2d', { willReadFrequently: true });
const publish = () => { props.value = item && { ...item }; };

const stage = make('div', { class: 'as-stage', id: 'start-stage' });
const backdrop = make('img', { class: 'as-stage-picture', alt: 'The start picture', draggable: 'false' });
const dot = make('i', { class: 'as-stage-brush' });
const tools = make('div', { class: 'as-tools' });
const told = make('p', { class: 'as-start-told', 'aria-live': 'polite' });
root.append(stage, tools, told);

// ------------------------------------------------------------------------------------------------ the mask

function sheetFor(width, height) {
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  return make('canvas', { class: 'as-paint', width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) });
}

async function load(mask) {
  const sheet = paint;
  const image = new Image();
  image.src = mask;
  try { await image.decode(); } catch { return; }
  if (sheet !== paint) return;
  const pen = penOf(sheet);
  pen.drawImage(image, 0, 0, sheet.width, sheet.height);
  const pixels = pen.getImageData(0, 0, sheet.width, sheet.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data[i + 3] = pixels.data[i];
    pixels.data.set(INK, i);
  }
  pen.putImageData(pixels, 0, 0);
}

function keep() {
  const sheet = make('canvas', { width: paint.width, height: paint.height });
  const pen = penOf(sheet);
  pen.drawImage(paint, 0, 0);
  for (const [colour, where] of [['white', 'source-in'], ['black', 'destination-over']]) {
    pen.globalCompositeOperation = where;
    pen.fillStyle = colour;
    pen.fillRect(0, 0, sheet.width, sheet.height);
  }
  const painted = pen.getImageData(0, 0, sheet.width, sheet.height).data.some((value, i) => i % 4 === 0 && value > 127);
  item.mask = painted ? sheet.toDataURL('image/png') : '';
  publish();
  drawTools();
}

function stroke(from, to) {
  const pen = penOf(paint);
  pen.globalCompositeOperation = tool === 'erase' ? 'destination-out' : 'source-over';
  pen.strokeStyle = `rgb(${INK})`;
  pen.lineCap = pen.lineJoin = 'round';
  pen.lineWidth = (brush / 100) * Math.max(paint.width, paint.height);
  pen.beginPath();
  pen.moveTo(from.x * paint.width, from.y * paint.height);
  pen.lineTo(to.x * paint.width, to.y * paint.height + 0.01);
  pen.stroke();
  pen.globalCompositeOperation = 'source-over';
}

function at(event) {
  const box = stage.getBoundingClientRect();
  return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
}

stage.addEventListener('pointerdown', (event) => {
  if (!item || tool === 'none' || event.button > 0) return;
  event.preventDefault();
  stage.setPointerCapture(event.pointerId);
  let last = at(event);
  stroke(last, last);
  const moved = (next) => { const now = at(next); stroke(last, now); last = now; };
  const ended = () => {
    stage.removeEventListener('pointermove', moved);
    keep();
  };
  stage.addEventListener('pointermove', moved);
  stage.addEventListener('lostpointercapture', ended, { once: true });
});
stage.addEventListener('pointermove', (event) => {
  const side = (brush / 100) * Math.max(stage.clientWidth, stage.clientHeight);
  const point = at(event);
  Object.assign(dot.style, { left: `${point.x * 100}%`, top: `${point.y * 100}%`, width: `${side}px`, height: `${side}px` });
});

// ------------------------------------------------------------------------------------------------ what is shown

function drawTools() {
  stage.dataset.tool = tool;
  const kind = (name, title) => make('button', {
    type: 'button', 'aria-pressed': String(tool === name), 'data-tool': name,
    onclick: () => { tool = tool === name ? 'none' : name; drawTools(); },
  }, title);
  const size = make('input', { type: 'range', min: '2', max: '40', step: '1', value: String(brush), 'aria-label': 'Size of the brush, percent' });
  size.addEventListener('input', () => { brush = Number(size.value); });
  const kinds = make('div', { class: 'as-tools-kinds' }, kind('brush', 'Paint'), kind('erase', 'Eraser'));
  const clear = make('button', { type: 'button', class: 'as-quiet', onclick: () => {
    penOf(paint).clearRect(0, 0, paint.width, paint.height);
    keep();
  } }, 'Clear paint');
  const away = make('button', { type: 'button', class: 'as-quiet', id: 'start-remove', onclick: () => {
    item = null;
    publish();
    draw();
  } }, 'Remove picture');
  tools.replaceChildren(kinds, ...(tool === 'none' ? [] : [size]), ...(item?.mask ? [clear] : []), away);
  const what = item?.mask ? 'Only what is painted is redrawn; the rest stays as it is.' : 'All of it is redrawn. Paint what should change to keep the rest.';
  told.textContent = item ? `${item.name}, ${item.size}. ${what}` : '';
}

function draw() {
  root.hidden = !item;
  stage.replaceChildren();
  if (!item) return;
  const [width, height] = item.pixels || [1, 1];
  paint = sheetFor(width, height);
  if (item.mask) load(item.mask);
  if (backdrop.getAttribute('src') !== item.url) backdrop.src = item.url;
  backdrop.classList.toggle('tiny', Math.max(width, height) <= 128);
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.maxWidth = `calc(min(440px, 62vh) * ${Math.max(0.3, width / height)})`;
  stage.append(backdrop, paint, dot);
  drawTools();
}

function take() {
  const given = props.value && props.value.id ? { ...props.value } : null;
  const same = given && item && given.id === item.id && given.mask === item.mask;
  item = given;
  if (!same) draw();
}

watch('value', take);
take();
