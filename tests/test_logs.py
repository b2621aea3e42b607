"""The toolkit's messages go where they should, and nobody else's handlers notice."""
import logging, os, subprocess, sys, threading
from pathlib import Path
import pytest
from deep_studio_nb.common.errors import RunError
from deep_studio_nb.common.logs import get_logger, log_config, logging_to, start_log

ROOT = Path(__file__).parents[1]

def run(code):
    "What another process prints and complains about."
    done = subprocess.run([sys.executable, '-c', code], env=os.environ|{'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr

@pytest.fixture(autouse=True)
def as_before():
    logger = get_logger()
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    for o in logger.handlers:
        if o not in before[0]: o.close()
    logger.handlers,logger.propagate = before[0],before[2]
    logger.setLevel(before[1])

def lines(path): return [o.rpartition(': ')[2] for o in path.read_text(encoding='utf-8').splitlines()]

def test_importing_configures_nothing():
    out,err = run("import logging\nfrom deep_studio_nb.common import logs, devices\nlog = logs.get_logger('train')\nlog.info('quiet')\nlog.warning('heard')\n"
                  "print(logging.getLogger().handlers, logs.get_logger().handlers, logs.get_logger().level)")
    assert (out, err)==('[] [] 0\n', 'heard\n')

def test_the_rest_of_the_program_keeps_its_logging(tmp_path):
    out,err = run(f"import logging\nfrom deep_studio_nb.common.logs import logging_to, get_logger\n"
                  f"logging.basicConfig(filename={str(tmp_path/'app.log')!r}, filemode='w', level=logging.INFO, format='%(message)s')\n"
                  f"app = logging.getLogger('app')\napp.info('before')\n"
                  f"with logging_to({str(tmp_path/'run.log')!r}, stream=False):\n    app.info('during')\n    get_logger('train').info('ours')\n"
                  f"app.info('after')\nget_logger('train').info('ours again')")
    assert (tmp_path/'app.log').read_text().split('\n')[:-1]==['before', 'during', 'after', 'ours again']
    assert lines(tmp_path/'run.log')==['ours'] and err==''

def test_the_file_is_closed_and_can_be_moved(tmp_path):
    with logging_to(tmp_path/'run.log', stream=False) as logger:
        [handler] = [o for o in logger.handlers if isinstance(o, logging.FileHandler)]
        logger.info('one')
    assert handler.stream is None or handler.stream.closed
    (tmp_path/'run.log').rename(tmp_path/'moved.log')
    get_logger('train').warning('nobody hears this')
    assert lines(tmp_path/'moved.log')==['one'] and not (tmp_path/'run.log').exists()

def test_a_resumed_run_goes_on_in_its_file(tmp_path):
    for word in ('first', 'second'):
        with logging_to(tmp_path/'run.log', stream=False): get_logger('train').info(word)
    assert lines(tmp_path/'run.log')==['first', 'second']

def test_an_error_ends_the_log_too(tmp_path):
    with pytest.raises(KeyError):
        with logging_to(tmp_path/'run.log', stream=False): raise KeyError
    assert get_logger().propagate and not [o for o in get_logger().handlers if isinstance(o, logging.FileHandler)]

def test_a_log_that_cannot_be_opened(tmp_path):
    (tmp_path/'file').write_text('')
    before = get_logger().handlers[:], get_logger().level, get_logger().propagate
    with pytest.raises(RunError, match='could not be opened.*Choose another folder'):
        with logging_to(tmp_path/'file'/'run.log'): pass
    with pytest.raises(RunError, match='could not be opened'):
        with logging_to(tmp_path): pass
    assert (get_logger().handlers, get_logger().level, get_logger().propagate)==before

def test_what_a_progress_bar_showed_is_in_the_file_only(tmp_path, capsys):
    with logging_to(tmp_path/'run.log'):
        get_logger('train').info('epoch 1', extra={'shown': True})
        get_logger('train').info('done')
    assert capsys.readouterr().out=='done\n' and lines(tmp_path/'run.log')==['epoch 1', 'done']

def test_threads_write_whole_lines(tmp_path):
    def talk(k):
        for i in range(50): get_logger('train').info(f'thread {k} line {i}')
    with logging_to(tmp_path/'run.log', stream=False):
        threads = [threading.Thread(target=talk, args=(k,)) for k in range(4)]
        for o in threads: o.start()
        for o in threads: o.join()
    assert sorted(lines(tmp_path/'run.log'))==sorted(f'thread {k} line {i}' for k in range(4) for i in range(50))

def test_the_dict_is_one_for_anybody(tmp_path):
    logging.config.dictConfig(log_config(tmp_path/'한글.log', verbosity=2, stream=False))
    get_logger('train').debug('자세히')
    assert lines(tmp_path/'한글.log')==['자세히']

def test_start_log_changes_the_file(tmp_path):
    for name in 'ab':
        start_log(tmp_path/name/'run.log', stream=False)
        get_logger('train').info(name)
    assert lines(tmp_path/'a'/'run.log')==['a'] and lines(tmp_path/'b'/'run.log')==['b']
