// The switch between light and dark mode; the choice is remembered.
const KEY = 'adapter-studio-theme';
const set = (dark) => { document.body.classList.toggle('dark', dark); document.documentElement.style.colorScheme = dark ? 'dark' : 'light'; };
const kept = localStorage.getItem(KEY);
if (kept) set(kept === 'dark');
element.addEventListener('click', (event) => {
  if (!event.target.closest('[data-theme-switch]')) return;
  const dark = !document.body.classList.contains('dark');
  set(dark);
  localStorage.setItem(KEY, dark ? 'dark' : 'light');
});
