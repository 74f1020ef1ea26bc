// What the pack adds to the front-end. Everything works without it; whatever here fails, fails silently.
import { app } from '../../../scripts/app.js'
import { api } from '../../../scripts/api.js'

const PANEL = 'open_sora_panel'
const REPORT = 'open_sora_report'
const SIZE = 'open_sora_size'
const TOKENS = 'open_sora_tokens'
const TEXT = '$$node-text-preview' // the front-end's own line below a node
const CHINESE = () => (app.extensionManager?.setting?.get('Comfy.Locale') ?? '').startsWith('zh')
const say = (english, chinese) => (CHINESE() ? chinese : english)

function quietly(work) {
  return (...args) => {
    try {
      const done = work(...args)
      return done?.catch ? done.catch(() => undefined) : done
    } catch {
      return undefined
    }
  }
}

// The nodes that "14:6" is seen on: 14 on the canvas, and 6 inside it.
function nodesOf(id) {
  const found = []
  let graph = app.rootGraph ?? app.graph
  for (const part of String(id).split(':')) {
    const node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part))
    if (!node) break
    found.push(node)
    graph = node.subgraph
  }
  return found
}

function remove(node, name) {
  for (const widget of (node.widgets ?? []).filter((one) => one.name === name)) {
    const height = widget.openSoraHeight
    if (node.removeWidget) node.removeWidget(widget)
    else {
      widget.onRemove?.()
      node.widgets.splice(node.widgets.indexOf(widget), 1)
    }
    if (height) node.setSize([node.size[0], Math.max(height, node.computeSize()[1])])
  }
}

// An element below a node's widgets, made when it is first needed.
function panel(node, name, tag, height) {
  let widget = node.widgets?.find((one) => one.name === name)
  if (!widget) {
    const element = document.createElement(tag)
    const least = () => height
    widget = node.addDOMWidget(name, name, element, { serialize: false, hideOnZoom: false, margin: 2, getMinHeight: least, getMaxHeight: least, getValue: () => '', setValue: () => {} })
    widget.serialize = false
    const [width, was] = node.size
    widget.openSoraHeight = was
    node.setSize([width, Math.max(node.computeSize()[1], was)]) // a node that was saved or copied has the room
  }
  return widget.element
}

// ---- the whole clip, moving, while it is sampled (nodes/host/preview.py)

const moving = new Set()
let isNew = true // this page: it has loaded no graph yet

// What is saved or copied of a node meanwhile has the height that it has without the picture.
const keepHeight = (node) => {
  const before = node.onSerialize
  if (before?.isOpenSora) return
  node.onSerialize = function (saved) {
    before?.call(this, saved)
    saved.size[1] = widgetOf(this, PANEL)?.openSoraHeight ?? saved.size[1]
  }
  node.onSerialize.isOpenSora = true
}

const showPreview = quietly(({ detail }) => {
  for (const node of nodesOf(detail.node)) {
    if (detail.off) {
      const element = panel(node, PANEL, 'div', 34)
      Object.assign(element.style, { font: '12px sans-serif', opacity: 0.8, padding: '2px 8px' })
      element.textContent = say(
        'Live preview is off. Settings › Comfy › Execution › Live preview method: auto.',
        '实时预览已关闭。设置 › Comfy › 执行 › 实时预览方法:auto。'
      )
    } else {
      if (node.widgets?.find((one) => one.name === PANEL)?.element.tagName === 'DIV') remove(node, PANEL)
      const element = panel(node, PANEL, 'img', 210)
      Object.assign(element.style, { width: '100%', height: '200px', objectFit: 'contain' })
      element.src = `data:image/webp;base64,${btoa(detail.image)}`
      element.alt = `${detail.step}/${detail.steps}`
    }
    keepHeight(node)
    moving.add(node)
    node.setDirtyCanvas?.(true, true)
  }
})

// The server is told who listens and the language that it speaks in; it answers with the picture of a run that goes on, if this page is new.
const greet = quietly(async () => {
  const { preview } = await ask({ locale: app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en', page: api.clientId })
  return preview
})

const clearPreviews = quietly(() => {
  for (const node of moving) remove(node, PANEL)
  moving.clear()
})

// What a node said last is no longer so once a run was stopped.
const clearLines = quietly(() => {
  for (const graph of [app.rootGraph, ...(app.rootGraph?.subgraphs?.values() ?? [])])
    for (const node of graph?.nodes ?? []) if (isOurs(node) || node.isSubgraphNode?.()) remove(node, TEXT)
})

// Nodes that say lines of forty characters, which a node of the least width would break.
const TELLING = ['OpenSoraRectifiedFlowSampler', 'OpenSoraContinueVideo', 'OpenSoraFluxToVideo', 'OpenSoraPreflight', 'OpenSoraLoadedModels']
const isOurs = (node) => String(node.comfyClass ?? node.type).startsWith('OpenSora')

// ---- beside a length: frames, seconds and pixels

const FPS = 24
const SIDES = { OpenSoraEmptyLatentVideo: 16, OpenSoraEmptyLatentHighCompression: 32, OpenSoraFluxToVideo: 16 }
const AREAS = { '256px': 256 ** 2, '768px': 768 ** 2 }
const LED = { OpenSoraEmptyLatentHighCompression: 0 } // frames are 4k there, 4k+1 elsewhere

export function framesOf(text, kind) {
  const lead = LED[kind] ?? 1
  const seconds = /^\s*(\d+(?:\.\d+)?) ?s\s*$/.exec(text)
  if (seconds) {
    // The nearest count that there is; the longer of two as near.
    const wanted = (Number(seconds[1]) * FPS - lead) / 4
    return Math.max(lead ? 0 : 2, Math.floor(wanted + 0.5)) * 4 + lead
  }
  return /^\s*\d+\s*$/.test(text) ? Number(text) : undefined
}

const widgetOf = (node, name) => node.widgets?.find((one) => one.name === name)
// What comes over a wire, also from the node that this one is inside of: its widget holds another value.
const isWired = (node, ...names) => node.inputs?.some((one) => one.link != null && names.includes(one.name))

const sizes = {} // "kind resolution ratio" -> [width, height], as the server counts them

async function ask(body) {
  const reply = await api.fetchApi('/open_sora/text', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) })
  return reply.ok ? reply.json() : {}
}

const describeLength = quietly(async (node, kind) => {
  const value = (name) => widgetOf(node, name)?.value
  const size = value('resolution') ?? value('size')
  for (const name of ['width', 'height']) {
    const side = widgetOf(node, name)
    if (side && size) side.disabled = size !== 'custom' && !isWired(node, 'resolution', 'size')
  }
  node.setDirtyCanvas?.(true, true)
  if (!widgetOf(node, 'num_frames')) return // what a length comes to is for the model to say that is plugged in
  const written = String(value('length') ?? '').trim()
  const frames = written ? framesOf(written, kind) : (value('num_frames') ?? 129)
  const isKnown = !isWired(node, 'length', written ? '' : 'num_frames')
  const wrong = isKnown && frames !== 1 && (!(frames >= 5) || (frames - (LED[kind] ?? 1)) % 4)
  const parts = wrong ? [`${written || frames}?`] : isKnown ? [say(`${frames} frames, ${(frames / FPS).toFixed(1)} s`, `${frames} 帧,${(frames / FPS).toFixed(1)} 秒`)] : []
  const resolution = value('resolution')
  const isSized = !isWired(node, 'resolution', ...(resolution === 'custom' ? ['width', 'height'] : ['aspect_ratio', 'image']))
  if (isSized && resolution === 'custom') parts.push(`${value('width')} x ${value('height')}`)
  else if (isSized && resolution && value('aspect_ratio')) {
    const key = `${kind} ${resolution} ${value('aspect_ratio')}`
    sizes[key] ??= (await ask({ size: [resolution, value('aspect_ratio'), SIDES[kind]] })).size
    if (sizes[key]) parts.push(sizes[key].join(' x '))
  }
  if (!parts.length) return remove(node, SIZE)
  const line = panel(node, SIZE, 'div', 22)
  Object.assign(line.style, { font: '12px sans-serif', padding: '2px 12px', opacity: 0.85, color: wrong ? '#e66' : '' })
  line.textContent = parts.join(' · ')
})

// ---- under a prompt: how much of it is read

const describePrompt = quietly(async (node) => {
  const value = (name) => widgetOf(node, name)?.value
  if (isWired(node, 'prompt')) return remove(node, TOKENS)
  const said = await ask({ prompt: value('prompt') ?? '', motion_score: value('motion_score'), fps: value('fps'), loaders: encodersOf(node) })
  if (!said.text) return
  const line = panel(node, TOKENS, 'div', 22)
  const over = said.dropped ? say(` · cut: …${said.dropped}`, ` · 被截断:…${said.dropped}`) : ''
  Object.assign(line.style, { font: '12px sans-serif', padding: '2px 12px', opacity: 0.85, whiteSpace: 'nowrap', overflow: 'hidden', textOverflow: 'ellipsis', color: said.dropped ? '#e93' : '' })
  line.textContent = `T5 ${said.t5.join('/')} · CLIP ${said.clip.join('/')}${over}`
  line.title = said.text
})

// The files that the encoder loader before a node names, so that the built-in model's own tokenizers count for it.
function encodersOf(node) {
  const slot = node.inputs?.find((one) => one.name === 'clip')
  const link = slot?.link == null ? undefined : (node.graph?.links?.get?.(slot.link) ?? node.graph?.links?.[slot.link])
  const loader = link && node.graph.getNodeById(link.origin_id)
  return ['t5_name', 'clip_l_name'].map((name) => widgetOf(loader ?? {}, name)?.value ?? '')
}

// Prompts are counted by what reads them.
const describePrompts = quietly((loader) => {
  for (const node of loader.graph?.nodes ?? []) if (node.comfyClass === 'OpenSoraT5TextEncode') describePrompt(node)
})

// Calls `work` soon after any of a node's widgets or wires has changed, and once at first.
function whenChanged(node, names, work) {
  let waiting
  const soon = () => {
    clearTimeout(waiting)
    waiting = setTimeout(work, 250)
  }
  for (const widget of (node.widgets ?? []).filter((one) => names.includes(one.name))) {
    const before = widget.callback
    widget.callback = function (...args) {
      soon()
      return before?.apply(this, args)
    }
    const field = widget.element ?? widget.inputEl
    field?.addEventListener?.('input', soon)
  }
  for (const event of ['onConfigure', 'onConnectionsChange']) {
    const before = node[event]
    node[event] = function (...args) {
      soon()
      return before?.apply(this, args)
    }
  }
  soon()
}

// ---- a report: the verdict first, then a row for each model or, with a bar against the card, for each stage

const showReport = quietly((node, head, rows, rest = '') => {
  const height = ({ text }) => 10 + 16 * Math.ceil(text.length / 44)
  const forget = quietly(() => {
    if (!widgetOf(node, TEXT)) return
    remove(node, TEXT) // which says the same, in less room
    node.setSize([node.size[0], node.computeSize()[1]])
  })
  forget()
  remove(node, REPORT) // its height follows its rows
  const box = panel(node, REPORT, 'div', 34 + rows.reduce((sum, row) => sum + height(row), rest ? 130 : 0))
  Object.assign(box.style, { font: '12px sans-serif', lineHeight: '16px', padding: '4px 10px', overflow: 'auto' })
  const add = (kind, text, style) => box.append(Object.assign(document.createElement(kind), { textContent: text, style }))
  add('b', head, '')
  for (const { text, share, colour } of rows) {
    const bar = share === undefined ? '' : `border: 1px solid #8886; background: linear-gradient(90deg, ${colour} ${share}%, transparent ${share}%)`
    add('div', text, `margin: 3px 0; padding: 1px 6px; ${bar}`)
  }
  if (rest) add('div', rest, 'height: 120px; overflow: auto; white-space: pre-wrap; font-size: 11px; opacity: 0.85')
  for (const wait of [500, 3000]) setTimeout(forget, wait) // the front-end may show it later than the result
})

const showPlan = (node, { verdict, card, stages }, report) => {
  const most = Math.max(card, ...stages.map(([, gib]) => gib))
  const row = ([name, gib]) => ({ text: `${name}: ${gib.toFixed(1)} GiB`, share: (100 * gib) / most, colour: gib > card ? '#c44' : '#4a8' })
  showReport(node, verdict, stages.map(row), report.replace(verdict, '').trim())
}

app.registerExtension({
  name: 'OpenSora',
  setup: quietly(() => {
    api.addEventListener('open_sora.preview', showPreview)
    api.addEventListener('execution_interrupted', clearLines)
    for (const end of ['execution_success', 'execution_error', 'execution_interrupted']) api.addEventListener(end, clearPreviews)
    api.addEventListener('execution_start', greet)
  }),
  afterConfigureGraph: quietly(async () => {
    if (isNew) isNew = false
    else return
    const preview = await greet()
    if (preview && !moving.size) showPreview({ detail: preview })
  }),
  nodeCreated: quietly((node) => {
    const kind = node.comfyClass
    if (!isOurs(node)) return
    if (TELLING.includes(kind)) node.setSize([Math.max(node.size[0], 320), node.size[1]])
    if (widgetOf(node, 'length')) {
      const names = ['length', 'num_frames', 'resolution', 'size', 'aspect_ratio', 'width', 'height']
      whenChanged(node, names, () => describeLength(node, kind))
    }
    if (kind === 'OpenSoraT5TextEncode') whenChanged(node, ['prompt', 'motion_score', 'fps'], () => describePrompt(node))
    if (kind === 'OpenSoraTextEncoderLoader') whenChanged(node, ['t5_name', 'clip_l_name'], () => describePrompts(node))
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.call(this, output)
      if (output?.open_sora_plan?.[0]) showPlan(this, output.open_sora_plan[0], output.text?.[0] ?? '')
      else if (kind === 'OpenSoraLoadedModels' && output?.text?.[0]) {
        const [head, ...rows] = output.text[0].split('\n')
        showReport(this, head, rows.map((text) => ({ text })))
      }
    }
  })
})
