-- For HTML: what pandoc's reader leaves out, and classes where its writer would put style attributes, which the page's
-- content security policy forbids.

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

-- An image is as wide as its figure, or has the class "narrow".
local function class_image(image)
  local width = image.attributes.width
  if width and width ~= "100%" then image.classes:insert("narrow") end
  image.attributes.width = nil
  return image
end

-- Columns are as wide as they need to be, and the first one heads its rows. An empty cell there means the same as the cell
-- above; it gets that text, because sorting may move its row. Cells of numbers have the class "right".
local function complete_table(table)
  local rights = {}
  for i, column in ipairs(table.colspecs) do
    rights[i] = column[1] == "AlignRight"
    column[1], column[2] = "AlignDefault", nil
  end
  local function class_cells(rows)
    for _, row in ipairs(rows) do
      for i, cell in ipairs(row.cells) do
        if rights[i] then cell.classes:insert("right") end
      end
    end
  end
  class_cells(table.head.rows)
  for _, body in ipairs(table.bodies) do
    body.row_head_columns = 1
    class_cells(body.body)
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

return { { Figure = name_figure, Image = class_image, Table = complete_table, Inlines = keep_interval } }
