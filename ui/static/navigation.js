// The menu follows the hidden tabs: whenever the page changes, address, title and marked link follow.
const links = [...element.querySelectorAll('[data-page]')];
const open = element.querySelector('.as-nav-open');
const button = (key) => document.getElementById(`page-${key}-button`);
const current = () => links.find((link) => button(link.dataset.page)?.getAttribute('aria-selected') === 'true');
const pathOf = (link) => new URL(link.getAttribute('href'), document.baseURI).pathname;
let shown = null;
let stepping = false;

const fold = (unfolded) => {
  element.querySelector('.as-nav').classList.toggle('unfolded', unfolded);
  open.setAttribute('aria-expanded', String(unfolded));
};

function mark() {
  const link = current();
  if (!link || link === shown) return;
  const first = shown === null;
  shown = link;
  links.forEach((other) => (other === link ? other.setAttribute('aria-current', 'page') : other.removeAttribute('aria-current')));
  open.querySelector('b').textContent = link.textContent;
  document.title = `${link.textContent} · Adapter Studio`;
  fold(false);
  if (first || stepping) { stepping = false; return; }
  if (location.pathname !== pathOf(link)) history.pushState(null, '', pathOf(link));
  window.scrollTo(0, 0);
}

element.addEventListener('click', (event) => {
  if (event.target.closest('.as-nav-open')) { fold(open.getAttribute('aria-expanded') !== 'true'); return; }
  const link = event.target.closest('[data-page]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  fold(false);
  button(link.dataset.page)?.click();
});
document.addEventListener('click', (event) => {  // a link on a page to another page
  const link = event.target.closest('[data-page-link]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  button(link.dataset.pageLink)?.click();
});
element.addEventListener('keydown', (event) => { if (event.key === 'Escape') { fold(false); open.focus(); } });
window.addEventListener('popstate', () => {
  const link = links.find((other) => pathOf(other) === location.pathname) || links[0];
  stepping = link !== shown;
  button(link.dataset.page)?.click();
});
new MutationObserver(mark).observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ['aria-selected'] });
mark();
