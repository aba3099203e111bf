"""The live lab and the replay: one view and its controls, over a running engine or over recorded runs.

source     what the view asks of whatever it shows: `session` (an engine at work), `recorded` (recorded runs)
frame      one moment as plain data; `series` makes the plotted points of it
figure     the frame in one plotly figure; `picture` the same frame as an SVG
controls   the widgets; `numbers` the table and the line about the tokens
show       who draws, and when: a task on the kernel's loop, or the cell itself
"""
