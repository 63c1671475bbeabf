"""What is drawn: the number of panels and lines, their data, labels and units; not what it looks like."""

from fwdlib.history import History, Run
from fwdlib.methods.history_figures import plot_histories
from fwdlib.plotting import METHOD_STYLES

NUM_TEST = 20


def make_history(num_seeds=2, every=5, iterations=12):
    # evaluated after 0, 5, 10 and 12 steps; seed i has i more errors
    runs = [
        Run(i, "completed", iterations, [2.0, 1.0, 0.5, 0.25], [2.0] * 4, [18 + i, 4 + i, 2 + i, 1 + i], [], every)
        for i in range(num_seeds)
    ]
    return History(runs, [{}] * num_seeds, NUM_TEST, 1, 0.0)


def lines(axes):
    """The curves of a panel, without the empty ones that only stand in the legend."""
    return [line for line in axes.lines if len(line.get_xdata())]


def test_histories_draw_each_seed_thin_and_their_mean_where_they_were_evaluated(drawn):
    figure = drawn(plot_histories, {"backprop": make_history(2), "FG-CV, no feedback": make_history(2)})
    loss, error = figure.axes
    for axes in figure.axes:
        assert [list(line.get_xdata()) for line in lines(axes)] == [[5, 10, 12]] * 6
    assert [list(line.get_ydata()) for line in lines(error)[:3]] == [[20, 10, 5], [25, 15, 10], [22.5, 12.5, 7.5]]
    assert list(lines(loss)[2].get_ydata()) == [1.0, 0.5, 0.25]
    assert (loss.get_ylabel(), error.get_ylabel()) == ("mean cross entropy [nats]", "wrong of 20 [%]")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Training loss, 2 seeds", "Test error, 2 seeds"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["backprop", "FG-CV, no feedback"]
    assert lines(error)[5].get_color() == METHOD_STYLES["FG-CV"]["color"]
    assert lines(error)[5].get_linestyle() == ":"
    assert plot_histories({"DFA": make_history(1)}).axes[0].get_title(loc="left") == "Training loss, one seed"
