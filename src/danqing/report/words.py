"""The words of a report, in English and Chinese."""

from __future__ import annotations

from danqing.verify.metrics import METRICS

LANGUAGES = ("en", "zh")

WORDS: dict[str, tuple[str, str]] = {
    "report_on": ("Adaptation report", "适配报告"),
    "summary": ("Summary", "结论"),
    "passed": ("passed", "通过"),
    "failed": ("FAILED", "未通过"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "unknown": ("not known", "未知"),
    "verdict": ("verdict", "判定"),
    "question": ("question", "检查项"),
    "answer": ("answer", "结果"),
    "case": ("task", "任务"),
    "text to image": ("Text to image", "文生图"),
    "edit": ("Image editing", "图像编辑"),
    "deterministic_q": ("Deterministic: the same bits again?", "确定性：重复运行是否逐位一致？"),
    "parity_q": ("Parity with {reference}", "与 {reference} 的一致性"),
    "sanity_q": ("Looks like a picture?", "是否为正常图像？"),
    "identical": ("identical", "逐位一致"),
    "close": ("close: every step within what its precision costs",
              "接近：每一步的误差都在该精度自身误差的限度之内"),
    "alike": ("alike: the pictures are, a step is beyond its limit",
              "相似：图像相似，但有步骤超出限度"),
    "different": ("different", "不一致"),
    "not_here": ("not to be had here", "本机不可用"),
    "picture": ("picture", "正常图像"),
    "black": ("black", "全黑"),
    "flat": ("one flat colour", "纯色"),
    "noise": ("pure noise", "纯噪声"),
    "simulated_note": (
        "This ran on a **simulated** device: arithmetic of the CPU behind the name of another "
        "device. It proves that the program's path works there. It proves neither the numerics "
        "nor the speed of real hardware.",
        "本报告在**模拟**设备上运行：以该设备的名义、用 CPU 完成运算。它只证明程序路径可用，"
        "不证明真实硬件的数值或速度。",
    ),
    "environment": ("Environment", "运行环境"),
    "item": ("item", "项目"),
    "value": ("value", "值"),
    "system": ("operating system", "操作系统"),
    "machine": ("architecture", "架构"),
    "processor": ("processor", "处理器"),
    "device": ("device", "设备"),
    "chip": ("chip", "芯片"),
    "device_memory": ("device memory", "设备内存"),
    "threads": ("threads", "线程数"),
    "made_at": ("made at", "生成时间"),
    "made_with": ("This report was made with", "生成本报告的命令"),
    "model": ("Model and weights", "模型与权重"),
    "layout": ("layout", "权重布局"),
    "place": ("place", "位置"),
    "fingerprint": ("fingerprint", "指纹"),
    "component": ("component", "组件"),
    "stored": ("stored in", "存储精度"),
    "computes": ("computes in", "计算精度"),
    "weights_memory": ("memory of weights", "权重内存"),
    "mapped": ("mapped from disk", "磁盘映射"),
    "load_s": ("load, s", "加载（秒）"),
    "total": ("total", "合计"),
    "digests": ("SHA-256 of the files", "文件 SHA-256"),
    "adapted": ("What was chosen, and why", "适配内容与原因"),
    "choice": ("choice", "选择"),
    "reason": ("reason", "原因"),
    "attention": ("attention", "注意力"),
    "dtype": ("dtype", "精度"),
    "placement": ("placement", "权重放置"),
    "noise_choice": ("noise", "噪声"),
    "noise_value": ("drawn on the CPU in float32 from the seed, then moved",
                    "由种子在 CPU 上以 float32 生成，再移到设备"),
    "noise_reason": ("the same on every device", "各设备完全相同"),
    "code_choice": ("code", "代码"),
    "code_value": ("no remote code, no flash_attn, no triton",
                   "不需要远程代码、flash_attn 或 triton"),
    "code_reason": ("diffusers' and transformers' own networks; kernels chosen by where the tensor is",
                    "使用 diffusers 与 transformers 自带的网络；按张量所在设备选择算子"),
    "parameters": ("Parameters", "参数"),
    "parameter": ("parameter", "参数"),
    "flag": ("flag", "命令行选项"),
    "default": ("default of this model", "本模型默认值"),
    "meaning": ("meaning", "含义"),
    "the_run": ("The run", "运行记录"),
    "stage": ("stage", "阶段"),
    "seconds": ("seconds", "秒"),
    "peak": ("peak memory", "峰值内存"),
    "load": ("load", "加载"),
    "encode": ("encode", "编码"),
    "denoise": ("denoise", "去噪"),
    "decode": ("decode", "解码"),
    "performance": ("Performance", "性能"),
    "performance_note": (
        "Medians of {repeats} pictures after one that does not count; every time is taken after "
        "the device has finished.",
        "为 {repeats} 张图像的中位数，第一张不计；每次计时都在设备完成之后。",
    ),
    "resolution": ("picture", "图像"),
    "steps": ("steps", "步数"),
    "s_step": ("seconds a step", "每步秒数"),
    "it_s": ("steps a second (it/s)", "每秒步数（it/s）"),
    "in_all": ("in all, loading left out", "总耗时（不含加载）"),
    "load_all": ("loading all weights", "加载全部权重"),
    "step_flops": ("operations of a step", "每步运算量"),
    "achieved": ("achieved", "实测算力"),
    "peak_flops": ("peak of the chip", "芯片峰值算力"),
    "share": ("share of the peak", "峰值利用率"),
    "file_size": ("size of the file", "文件大小"),
    "determinism": ("Determinism", "确定性"),
    "way": ("repeated", "重复方式"),
    "tensors": ("tensors compared", "比较的张量数"),
    "first_divergence": ("first that differs", "首个不同的张量"),
    "again in this process": ("again in this process", "同一进程内再次运行"),
    "after another request": ("after another request", "在另一请求之后"),
    "after loading again": ("after loading again", "重新加载权重之后"),
    "in another process": ("in another process", "另一进程"),
    "in_a_batch": ("in a batch of {size} (told, not judged)", "{size} 张一批（仅告知，不判定）"),
    "measure": ("measure", "指标"),
    "two_runs": ("first and second run", "第一次与第二次运行"),
    "to_reference": ("{device} to reference", "{device} 与参考"),
    "precision_alone": ("precision alone", "仅精度造成"),
    "pixels_identical": ("pixels identical", "像素完全一致"),
    "infinite": ("infinite", "无穷大"),
    "cost": (
        "With deterministic kernels a picture takes {with_s:.3f} s, without {without_s:.3f} s "
        "({ratio:.2f} times).",
        "使用确定性算子时每张 {with_s:.3f} 秒，不使用时 {without_s:.3f} 秒（{ratio:.2f} 倍）。",
    ),
    "parity": ("Parity", "一致性"),
    "reference": ("reference", "参考"),
    "candidate": ("candidate", "被检设备"),
    "difference_x": ("difference, times {factor}", "差异（放大 {factor} 倍）"),
    "parity_note": (
        "Relative L2 errors. **Port** is the device's own error, given the reference's input to this "
        "very stage and step; **precision** is the noise floor, what {dtype} costs there anyway (the "
        "reference in {dtype} against the CPU in float32, or, in float32, one unit in the last "
        "place); the **limit** is {factor:g} floors; **drift** is how far the free run has gone by "
        "then.",
        "均为相对 L2 误差。**移植**：给定参考在该阶段、该步的输入，设备自身的误差；**精度**：噪声底，"
        "即 {dtype} 本身在此处的代价（参考以 {dtype} 计算与 CPU float32 之差；float32 时为末位一个单位的"
        "扰动）；**限度**为 {factor:g} 倍噪声底；**漂移**：自由运行至此累积的偏离。",
    ),
    "blame": (
        "Whose fault: at `{worst}`, the joint nearest its limit, precision costs {precision:.2e} and "
        "the port {port} ({ratio} times).",
        "归因：在最接近限度的 `{worst}` 处，精度造成 {precision:.2e}，移植造成 {port}（{ratio} 倍）。",
    ),
    "joint": ("joint", "张量"),
    "port": ("port", "移植"),
    "precision": ("precision", "精度"),
    "limit": ("limit", "限度"),
    "drift": ("drift", "漂移"),
    "within": ("within", "限度内"),
    "all_joints": ("all joints", "全部张量"),
    "no_parity": ("No reference was asked for.", "未指定参考。"),
    "culprit": ("First layer beyond its limit", "首个超限的层"),
    "given": ("what it was given", "该层的输入"),
    "search": ("how it was found", "查找过程"),
    "error_plot": ("Error by joint, and the noise floor", "各张量误差与噪声底"),
    "histogram": ("Histogram of pixel differences", "像素差直方图"),
    "levels": ("difference, levels", "差值（级）"),
    "values": ("values", "数值个数"),
    "floor_band": ("noise floor to limit", "噪声底至限度"),
    "switches": ("Switches of memory and speed", "内存与速度开关"),
    "switch": ("switch", "开关"),
    "batch of 2": ("batch of 2 (told, not judged)", "两张一批（仅告知，不判定）"),
    "conditioning reused": ("conditioning reused", "复用文本条件"),
    "note": ("note", "说明"),
    "warnings": ("Known warnings that do no harm", "已知的无害警告"),
    "warning": ("warning", "警告"),
    "no_warnings": ("None are known for this device.", "该设备没有已知的无害警告。"),
    "how_to_read": ("The truth is report.json; this page is a view of it.",
                    "以 report.json 为准；本页由其生成。"),
}  # fmt: skip
"""Key to the English and the Chinese text."""


def is_word(key: str) -> bool:
    """Say whether a key has texts."""
    return _texts(key) is not None


def _texts(key: str) -> tuple[str, str] | None:
    """Return the texts of a key, which may be the name of a metric."""
    return WORDS.get(key) or next((row.words for row in METRICS if row.name == key), None)


def word(key: str, language: str, **values: object) -> str:
    """Return a text in a language; a key that is no word is returned as it is."""
    texts = _texts(key)
    if texts is None:
        return key
    text = texts[LANGUAGES.index(language)]
    return text.format(**values) if values else text
