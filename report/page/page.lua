-- For HTML: what pandoc's readers leave out. Metadata `notebooks` is the folder of the notebooks' pages, as seen from this page.

local stringify = pandoc.utils.stringify
local notebooks = ""

-- figures/cost.svg can be linked to as #fig-cost
local function name_figure(figure)
  figure:walk({
    Image = function(image)
      local stem = image.src:match("([^/]+)%.svg$")
      if stem and figure.identifier == "" then figure.identifier = "fig-" .. stem end
    end,
  })
  return figure
end

-- Columns are as wide as they need to be; the first one heads its rows. An empty cell there stands for the one above,
-- from which sorting would tear it off.
local function mend_table(table)
  for _, column in ipairs(table.colspecs) do column[2] = nil end
  for _, body in ipairs(table.bodies) do
    body.row_head_columns = 1
    local above
    for _, row in ipairs(body.body) do
      local first = row.cells[1]
      if above and stringify(first.contents) == "" then first.contents = above end
      above = first.contents
    end
  end
  return table
end

-- An interval, [1.00, 1.10], stays on one line.
local function keep_interval(inlines)
  for i = 2, #inlines - 1 do
    local isInner = inlines[i].t == "Space" or inlines[i].t == "SoftBreak"
    local before, after = inlines[i - 1].text, inlines[i + 1].text
    if isInner and before and after and before:match("^%[.+,$") and after:match("%]%p*$") then
      inlines[i] = pandoc.Str("\u{a0}")
    end
  end
  return inlines
end

-- A browser shows a notebook's page, not its file.
local function link_to_page(link)
  local stem = link.target:match("([%w_%-]+)%.ipynb$")
  if stem and not link.target:find(":") and not link.classes:includes("file") then
    link.target = notebooks .. stem .. ".html"
  end
  return link
end

-- A cell of text is no box: headings anywhere in it belong to the contents.
local function unbox_text(div)
  if div.classes:includes("cell") and div.classes:includes("markdown") then return div.content end
end

return {
  { Meta = function(meta) notebooks = meta.notebooks and stringify(meta.notebooks) or "" end },
  { Figure = name_figure, Table = mend_table, Inlines = keep_interval, Link = link_to_page, Div = unbox_text },
}
