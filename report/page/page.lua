-- For HTML: what pandoc's reader leaves out.

local stringify = pandoc.utils.stringify

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

-- Columns are as wide as they need to be, and the first one heads its rows. An empty cell there means the same as the cell
-- above; it gets that text, because sorting may move its row.
local function complete_table(table)
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

return { { Figure = name_figure, Table = complete_table, Inlines = keep_interval } }
