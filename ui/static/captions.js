// Pictures with their captions: props.value is a list of {id, url, name, size, caption}.
const board = element.querySelector('.as-captions');
let items = [];

const publish = () => { props.value = items.map((item) => ({ ...item })); };
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
};

function drawItem(item, index) {
  const caption = make('textarea', {
    rows: '2', placeholder: 'Caption (optional)', 'aria-label': `Caption of ${item.name}`, spellcheck: 'false',
  });
  caption.value = item.caption || '';
  caption.addEventListener('input', () => { item.caption = caption.value; publish(); });
  const remove = make('button', { type: 'button', class: 'as-icon', 'aria-label': `Remove ${item.name}`, onclick: () => {
    items.splice(index, 1); publish(); draw();
  } }, '×');
  return make('li', { class: 'as-caption' }, make('img', { src: item.url, alt: item.name, loading: 'lazy' }),
    make('div', {}, make('p', {}, make('strong', {}, item.name), make('span', {}, item.size || '')), caption), remove);
}

function draw() { board.replaceChildren(...items.map(drawItem)); board.hidden = items.length === 0; }
function take() { items = (props.value || []).map((item) => ({ ...item })); draw(); }
watch('value', take);
take();
