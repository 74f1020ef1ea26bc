// What the pack adds to the front-end. Everything works without it; whatever here fails, fails silently.
import { app } from '../../../scripts/app.js'
import { api } from '../../../scripts/api.js'

const PANEL = 'open_sora_panel'
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
    widget = node.addDOMWidget(name, name, element, { serialize: false, hideOnZoom: false, getMinHeight: least, getMaxHeight: least, getValue: () => '', setValue: () => {} })
    widget.serialize = false
    const [width, was] = node.size
    widget.openSoraHeight = was
    node.setSize([width, Math.max(node.computeSize()[1], was + height + 12)])
  }
  return widget.element
}

// ---- the whole clip, moving, while it is sampled (nodes/host/preview.py)

const moving = new Set()

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
      const before = element.src
      element.src = URL.createObjectURL(new Blob([Uint8Array.from(detail.image, (c) => c.charCodeAt(0))], { type: 'image/webp' }))
      if (before) URL.revokeObjectURL(before)
      element.alt = `${detail.step}/${detail.steps}`
    }
    moving.add(node)
    node.setDirtyCanvas?.(true, true)
  }
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

const sizes = {} // "kind resolution ratio" -> [width, height], as the server counts them

async function ask(body) {
  const reply = await api.fetchApi('/open_sora/text', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) })
  return reply.ok ? reply.json() : {}
}

const describeLength = quietly(async (node, kind) => {
  const value = (name) => widgetOf(node, name)?.value
  const written = String(value('length') ?? '')
  const frames = written.trim() ? framesOf(written, kind) : (value('num_frames') ?? 129)
  const wrong = frames === undefined || (frames - (LED[kind] ?? 1)) % 4
  const parts = [wrong ? say(`${written}?`, `${written}?`) : say(`${frames} frames, ${(frames / FPS).toFixed(1)} s`, `${frames} 帧,${(frames / FPS).toFixed(1)} 秒`)]
  const resolution = value('resolution')
  if (resolution === 'custom') parts.push(`${value('width')} x ${value('height')}`)
  else if (resolution && value('aspect_ratio')) {
    const key = `${kind} ${resolution} ${value('aspect_ratio')}`
    sizes[key] ??= (await ask({ size: [resolution, value('aspect_ratio'), SIDES[kind]] })).size
    if (sizes[key]) parts.push(sizes[key].join(' x '))
  }
  const line = panel(node, 'open_sora_size', 'div', 22)
  Object.assign(line.style, { font: '12px sans-serif', padding: '2px 12px', opacity: 0.85, color: wrong ? '#e66' : '' })
  line.textContent = parts.join(' · ')
  for (const name of ['width', 'height']) {
    const side = widgetOf(node, name)
    if (side && resolution) side.disabled = resolution !== 'custom'
  }
  node.setDirtyCanvas?.(true, true)
})

// ---- under a prompt: how much of it is read

const describePrompt = quietly(async (node) => {
  const value = (name) => widgetOf(node, name)?.value
  const said = await ask({ prompt: value('prompt') ?? '', motion_score: value('motion_score'), fps: value('fps'), loaders: encodersOf(node) })
  if (!said.text) return
  const line = panel(node, 'open_sora_tokens', 'div', 22)
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

// Calls `work` soon after any of a node's widgets has changed, and once at first.
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
  const configured = node.onConfigure
  node.onConfigure = function (...args) {
    soon()
    return configured?.apply(this, args)
  }
  soon()
}

// ---- a plan: the verdict and a bar for each stage

const showPlan = quietly((node, plan) => {
  const box = panel(node, 'open_sora_plan', 'div', 60 + 24 * plan.stages.length)
  Object.assign(box.style, { font: '12px sans-serif', padding: '4px 10px', overflow: 'auto' })
  box.replaceChildren()
  const head = document.createElement('b')
  head.textContent = plan.verdict
  box.append(head)
  const most = Math.max(plan.card, ...plan.stages.map(([, gib]) => gib))
  for (const [name, gib] of plan.stages) {
    const row = document.createElement('div')
    row.title = row.textContent = `${name}: ${gib.toFixed(1)} GiB`
    const share = (100 * gib) / most
    const colour = gib > plan.card ? '#c44' : '#4a8'
    Object.assign(row.style, { margin: '3px 0', padding: '2px 6px', background: `linear-gradient(90deg, ${colour} ${share}%, transparent ${share}%)`, border: '1px solid #8886' })
    box.append(row)
  }
})

app.registerExtension({
  name: 'OpenSora',
  setup: quietly(async () => {
    api.addEventListener('open_sora.preview', showPreview)
    api.addEventListener('execution_interrupted', clearLines)
    for (const end of ['execution_success', 'execution_error', 'execution_interrupted']) api.addEventListener(end, clearPreviews)
    await ask({ locale: app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en' })
  }),
  nodeCreated: quietly((node) => {
    const kind = node.comfyClass
    if (!isOurs(node)) return
    if (widgetOf(node, 'length')) {
      const names = ['length', 'num_frames', 'resolution', 'aspect_ratio', 'width', 'height']
      whenChanged(node, names, () => describeLength(node, kind))
    }
    if (kind === 'OpenSoraT5TextEncode') whenChanged(node, ['prompt', 'motion_score', 'fps'], () => describePrompt(node))
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.call(this, output)
      if (output?.open_sora_plan?.[0]) showPlan(this, output.open_sora_plan[0])
    }
  })
})
