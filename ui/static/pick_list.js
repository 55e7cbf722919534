// Clicks on anything with data-pick become one event that names it.
element.addEventListener('click', (event) => {
  const picked = event.target.closest('[data-pick]');
  if (picked && !picked.disabled) trigger('select', { picked: picked.dataset.pick });
});
