// The adapters of a composition: props.value is a list of rows, redrawn only when Python changes it.
const rack = element.querySelector('.as-rack');
const tones = ['a', 'b', 'c', 'd', 'e', 'f'];
let rows = [];

const publish = () => { props.value = rows.map((row) => ({ ...row })); };
// Regions offer these adapters.
const announce = () => document.dispatchEvent(new CustomEvent('as-rack', {
  detail: rows.map(({ name, triggers }) => ({ name, triggers })),
}));
document.addEventListener('as-rack-wanted', announce);
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
};
const clamp = (value, low, high) => Math.min(high, Math.max(low, Number.isFinite(value) ? value : low));

// What a distilled adapter has built in at its weight, and whether it was trained for that.
function builtIn(row) {
  const { mode, guidance, low, high, steps } = row.distilled || {};
  const few = steps ? `, for ${steps} steps` : '';
  if (mode === 'embedding') return `Distilled: choose guidance ${low} to ${high} below${few}.`;
  const now = 1 + row.weight * (guidance - 1);
  const outside = mode === 'strength' && (now < low || now > high) ? ` (trained on ${low} to ${high})` : '';
  const about = mode === 'strength' || row.weight === 1 ? '' : 'about ';
  return `Distilled: ${about}guidance ${Math.round(now * 10) / 10} built in${outside}${few}.`;
}

function weightControl(row) {
  const number = make('input', { type: 'number', step: '0.05', value: row.weight, 'aria-label': `Weight of ${row.name}` });
  const slider = make('input', {
    type: 'range', min: '-1', max: '2', step: '0.05', value: row.weight, 'aria-label': `Weight of ${row.name}, slider`,
  });
  const words = make('output', { class: 'as-rack-built-in' });
  const fill = () => {
    slider.style.setProperty('--fill', `${((clamp(row.weight, -1, 2) + 1) / 3) * 100}%`);
    words.textContent = builtIn(row);
  };
  const change = (value) => { if (Number.isFinite(value)) { row.weight = value; fill(); publish(); } };
  slider.addEventListener('input', () => { number.value = slider.value; change(parseFloat(slider.value)); });
  number.addEventListener('input', () => { slider.value = number.value; change(parseFloat(number.value)); });
  fill();
  const line = make('div', { class: 'as-rack-line' }, make('span', { class: 'as-rack-label' }, 'Weight'), slider, number);
  return row.distilled ? make('div', {}, line, words) : line;
}

function scheduleControl(row) {
  if (row.schedule && row.schedule.length) {
    const clear = make('button', { type: 'button', class: 'as-link', onclick: () => {
      row.schedule = []; row.start = 0; row.end = 1; publish(); draw();
    } }, 'use always');
    return make('div', { class: 'as-rack-line' }, make('span', { class: 'as-rack-label' }, 'Steps'),
      make('span', { class: 'as-rack-custom' }, `own schedule, ${row.schedule.length} keyframes`), clear);
  }
  const percent = (value) => Math.round(value * 100);
  const range = make('div', { class: 'as-span' });
  const words = make('output', { class: 'as-rack-words' });
  const thumb = (which, name) => make('input', {
    type: 'range', min: '0', max: '100', step: '5', value: percent(row[which]), 'aria-label': `${name} of ${row.name}, percent of the steps`,
  });
  const start = thumb('start', 'Start');
  const end = thumb('end', 'End');
  const show = () => {
    range.style.setProperty('--from', `${percent(row.start)}%`);
    range.style.setProperty('--to', `${percent(row.end)}%`);
    words.textContent = row.start === 0 && row.end === 1 ? 'all steps' : `${percent(row.start)}–${percent(row.end)} %`;
  };
  start.addEventListener('input', () => {
    row.start = clamp(start.value / 100, 0, row.end - 0.05); start.value = percent(row.start); show(); publish();
  });
  end.addEventListener('input', () => {
    row.end = clamp(end.value / 100, row.start + 0.05, 1); end.value = percent(row.end); show(); publish();
  });
  range.append(make('i'), start, end);
  show();
  return make('div', { class: 'as-rack-line' }, make('span', { class: 'as-rack-label' }, 'Active'), range, words);
}

// Strength in the text encoders and factors per block: rarely needed, so folded.
function moreControl(row) {
  const encoder = make('input', {
    type: 'number', step: '0.05', placeholder: 'same', value: row.te_weight, 'aria-label': `Text encoder weight of ${row.name}`,
  });
  encoder.addEventListener('input', () => {
    const value = parseFloat(encoder.value);
    row.te_weight = Number.isFinite(value) ? value : null;
    publish();
  });
  const blocks = make('textarea', {
    rows: '2', placeholder: 'down_blocks.1: 0.5', spellcheck: 'false', 'aria-label': `Block factors of ${row.name}, one per line`,
  });
  blocks.value = typeof row.blocks === 'string' ? row.blocks
    : Object.entries(row.blocks || {}).map(([prefix, factor]) => `${prefix}: ${factor}`).join('\n');
  blocks.addEventListener('input', () => { row.blocks = blocks.value; publish(); });
  const used = (row.te_weight !== null && row.te_weight !== undefined) || blocks.value;
  return make('details', { class: 'as-fold', open: used ? '' : null }, make('summary', {}, 'Advanced'),
    make('div', { class: 'as-rack-line' }, make('span', { class: 'as-rack-label' }, 'Text'),
      make('span', { class: 'as-rack-custom' }, 'weight in the text encoders'), encoder),
    make('label', { class: 'as-rack-blocks' }, make('span', { class: 'as-rack-label' }, 'Factor per block, one per line'), blocks));
}

function triggerChips(row) {
  if (!row.triggers || !row.triggers.length) return '';
  const chips = row.triggers.map((word) => make('button', {
    type: 'button', class: 'as-chip', title: 'Add to the prompt', onclick: () => trigger('insert_word', { word }),
  }, `+ ${word}`));
  return make('div', { class: 'as-rack-chips' }, ...chips);
}

function portrait(row) {
  if (row.preview) return make('img', { class: 'as-thumb', src: row.preview, alt: '' });
  return make('span', { class: 'as-thumb', 'aria-hidden': 'true' }, row.name.slice(0, 1).toUpperCase());
}

function drawRow(row, index) {
  const remove = make('button', { type: 'button', class: 'as-icon', 'aria-label': `Remove ${row.name}`, onclick: () => {
    rows.splice(index, 1); publish(); draw();
  } }, '×');
  const move = (by, word, sign) => make('button', {
    type: 'button', class: 'as-icon as-move', 'aria-label': `Move ${row.name} ${word}`, title: `Move ${word}`,
    disabled: rows[index + by] ? null : '', onclick: () => {
      [rows[index], rows[index + by]] = [rows[index + by], rows[index]];
      publish();
      draw();
      const again = [...rack.querySelectorAll('.as-rack-row')][index + by].querySelectorAll('.as-move');
      (again[by < 0 ? 0 : 1].disabled ? again[by < 0 ? 1 : 0] : again[by < 0 ? 0 : 1]).focus();
    },
  }, sign);
  const order = rows.length > 1 ? [move(-1, 'up', '↑'), move(1, 'down', '↓')] : [];
  const title = make('div', { class: 'as-rack-title' }, make('strong', {}, row.name), make('span', {}, row.facts || ''));
  const head = make('div', { class: 'as-rack-head' }, portrait(row), title, ...order, remove);
  return make('li', { class: `as-rack-row tone-${tones[index % tones.length]}` },
    head, triggerChips(row), weightControl(row), scheduleControl(row), moreControl(row));
}

function draw() {
  announce();
  if (!rows.length) {
    rack.replaceChildren(make('li', { class: 'as-rack-none' }, 'No adapter yet: the base model draws alone. Choose one above.'));
    return;
  }
  rack.replaceChildren(...rows.map(drawRow));
}

function take() { rows = (props.value || []).map((row) => ({ ...row })); draw(); }
watch('value', take);
take();
